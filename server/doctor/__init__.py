"""What this machine has and what it lacks; nothing here imports what it asks about."""
