"""How the pocket model was made, in the order in which the data flows; its rows are `dspy_greater.pocket.tasks`.

grammar.py      instructions, and how strongly each asks for working a row out
transcript.py   row + instruction + reasoning -> the chat DSPy would send and read
vocabulary.py   transcripts -> byte-level BPE tokenizer and chat template
train.py        transcripts -> weights
evaluate.py     weights -> the table of the model card

It runs where only torch, transformers and tokenizers are installed.
"""
