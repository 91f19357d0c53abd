"""Refuses copies of a routed model."""

from typing import NoReturn

from phatgoose.errors import RoutingError


def refuse_copy(_protocol: object) -> NoReturn:
    """Answer copy.deepcopy and pickle, which ask for `__reduce_ex__`, for a routed model or layer.

    A copy's hooks would go on serving the original.
    """
    raise RoutingError(
        "a routed model can be neither copied nor pickled (copy.deepcopy, torch.save of the whole "
        "model, a queue to another process): its hooks belong to this very model. Call "
        "phatgoose.unroute(model), copy or save it, then route each. model.state_dict() can be "
        "saved as it is."
    )
