"""What can go wrong between two roles; every error says who was meant and what to do."""


class TransportError(RuntimeError):
    """Base of all errors of the transport."""


class EndpointMissing(TransportError):
    """A server did not announce its address in time."""


class KeysMissing(TransportError):
    """An address beyond loopback was asked for without CURVE keys, or the keys are not readable."""


class MessageTooLarge(TransportError):
    """A message of ours is larger than the receiver accepts."""


class RequestTimeout(TransportError):
    """No reply in time; the message names the server, the request and for how long it was awaited."""


class RequestRefused(TransportError):
    """The server answered `Refused`; the text is its reason."""
