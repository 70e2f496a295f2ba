"""Redis in each form that a deployment may have."""
