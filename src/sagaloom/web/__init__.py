"""What every HTTP door is built from: who may come in, how a body is read, what an error looks like, how a route is
described, and the ASGI application around all of it.

Doors do not import each other; what two of them need is here, one floor below.
"""
