"""OpenAI's Responses API: responses that may be stored, continued, cancelled and streamed."""
