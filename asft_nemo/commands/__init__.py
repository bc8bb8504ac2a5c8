"""The commands of `asft`, one module a kind. Each imports what is heavy only when it runs."""
