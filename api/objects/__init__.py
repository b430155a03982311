"""OpenAI's stored objects: files, batches, stored responses, and the endpoints that webhooks are sent to."""
