"""Adapters to other people's models and trainers; each is imported by name, so none of them is a requirement."""
