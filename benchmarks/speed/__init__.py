"""How fast one step of the search is: three schedules of the same work, and the floor under them.

    shapes.py     an engine: the pocket model, or random weights of a well-known shape
    work.py       what one step has to do, as token ids; the same for everyone
    released.py   the order of work that the algorithm was published with
    plain.py      Hugging Face transformers as a competent user calls it
    ours.py       what the search of this package does
    gate.py       the three have to come to the same numbers before anything is timed
    sizes.py      the dimensions of a model, and the rates of a machine
    machine.py    what this machine can do at best, measured in the same run
    floor.py      the least seconds in which it could do one step
    timing.py     repeats that take turns, seconds and memory
    report.py     measurements -> JSON and tables
    scale.py      how the seconds grow with the size of the step
    overhead.py   what a step costs through DSPy beyond its token-level work
    workers.py    the reading of a step on several workers, against one
    command.py    the command line
    estimate.py   what a search was said to cost, and what it cost

All of it but `overhead.py` and `estimate.py` runs where only torch and transformers are installed.
"""
