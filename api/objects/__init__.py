"""OpenAI's files and batches, and the endpoints that webhooks are sent to."""
