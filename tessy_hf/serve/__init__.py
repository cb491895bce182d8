"""Teacher and student as one model behind an OpenAI-compatible endpoint, to examine what they write together."""
