"""Stand-in for the package tensorrt_llm in a rehearsal: only its Python runtime, and of that only what the version's table has."""
