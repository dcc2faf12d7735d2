"""Types, cards, configuration and naming. Standard library, pydantic and YAML only; never torch."""
