"""What a compiled program costs on chips that aren't here."""
