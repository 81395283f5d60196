"""The demo: one worker reads a contract, another answers about it without reading it again."""
