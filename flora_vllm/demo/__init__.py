"""The demonstration: its models and adapters, served and checked."""
