"""Models behind servers: who answers there, with which weights, and whether it is the model that is loaded here.

The modules in the order in which the data flows, from the address of an LM's server (`lm/address.py`):

    http.py      one question to a server -> its reply, whatever happens
    kinds.py     address -> what kind of server answers, what it serves, which weights it says those are
    weights.py   LM, `weights=` and server -> the weights, loaded here
    parity.py    server and weights -> the same prompt, and the tokens that the weights would have written
    watch.py     runs of a program -> the same of every call, as it is made
    record.py    what of all that is told in the end
"""
