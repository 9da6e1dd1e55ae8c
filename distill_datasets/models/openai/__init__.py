"""Every server that speaks OpenAI's chat protocol."""
