"""Where keys and values live: block bookkeeping (pure Python), the paged storage, and rotary tables."""
