"""The models Argosy can run; one package each."""
