"""From text to rows, in this order.

`tokenizer` and `hf_tokenizer.load` make ids of text, `stream.Stream` gives a run its examples,
`encode` makes prompts of them for the sampler, or demonstrations for the learner.
"""
