"""Several processes that train one model: the only place that knows ``torch.distributed``.

:mod:`~mupx.distributed.communicator` is what the rest talks to; :mod:`~mupx.distributed.joining` finds the
other processes, :mod:`~mupx.distributed.launching` starts them, :mod:`~mupx.distributed.sharding` handles
tensors and models that are split over them, :mod:`~mupx.distributed.assignment` divides the work.
"""
