"""An OpenAI-compatible server over the engine, and the chat page that it serves."""
