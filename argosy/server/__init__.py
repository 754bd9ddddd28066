"""The HTTP server: OpenAI's API over one or more engines in processes of their own. Imports no torch."""
