"""From text to rows, in order: tokenizers, the stream of examples, their encoding."""
