"""What happens in the prefix tree, as events that routers of several replicas read."""
