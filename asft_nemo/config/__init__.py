"""Settings: schema, composition, rules."""
