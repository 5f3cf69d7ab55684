"""Why there is no clip, and what is worth trying again. Messages of the downloader are sorted by their words."""

from __future__ import annotations

import re
from enum import StrEnum


class Reason(StrEnum):
    """Reason codes, as they stand in the ledger."""

    # Gone for good: a tombstone, not asked for again without --retry-gone.
    PRIVATE = "private"
    REMOVED = "removed"
    TERMINATED = "terminated"  # the uploader's account was closed
    COPYRIGHT = "copyright"
    COUNTRY = "country"  # not available from here
    AGE = "age"  # asks for a signed-in adult
    MEMBERS = "members"  # for members or buyers
    # Passing: tried again within the run, and in the next one.
    RATE_LIMIT = "rate-limit"
    BOT_CHECK = "bot-check"  # asks for cookies of a signed-in browser
    FORBIDDEN = "forbidden"
    NETWORK = "network"
    TIMEOUT = "timeout"
    OTHER = "other"  # a message that no pattern knows
    # Of this clip: asking again at once changes nothing; the next run tries.
    NO_FORMAT = "no-format"
    DECODE = "decode"
    LENGTH = "length"  # the video ends before the annotation does
    HOLE = "hole"  # pictures are missing inside
    CROP = "crop"  # the crop lies outside the picture
    INTERNAL = "internal"  # a library failed in a way no other code describes


GONE = frozenset(
    (Reason.PRIVATE, Reason.REMOVED, Reason.TERMINATED, Reason.COPYRIGHT, Reason.COUNTRY, Reason.AGE, Reason.MEMBERS)
)
PASSING = frozenset(
    (Reason.RATE_LIMIT, Reason.BOT_CHECK, Reason.FORBIDDEN, Reason.NETWORK, Reason.TIMEOUT, Reason.OTHER)
)
# The server asks everyone here to slow down, so that all workers wait.
SLOW_DOWN = frozenset((Reason.RATE_LIMIT, Reason.BOT_CHECK))

# The first pattern that fits counts: what passes stands before what sounds final ("isn't available, try again later"),
# and a closed account before the removed video that it explains.
PATTERNS = (
    (Reason.RATE_LIMIT, r"HTTP Error 429|too many requests|rate.?limit|try again later"),
    (Reason.BOT_CHECK, r"not a bot|captcha"),
    (Reason.AGE, r"confirm your age|age.?restrict|inappropriate for some users"),
    (Reason.PRIVATE, r"private video|video is private"),
    (
        Reason.TERMINATED,
        r"(account|channel)\b.*\b(terminated|closed|suspended)|(closed|terminated) (the|their).*account",
    ),
    (Reason.COUNTRY, r"(your|this) country|geo.?restrict|your (location|region)"),
    (Reason.COPYRIGHT, r"copyright"),
    (Reason.MEMBERS, r"members.?only|join this channel|requires payment|premium members"),
    (Reason.NO_FORMAT, r"requested format is not available|no video formats"),
    (Reason.TIMEOUT, r"timed? ?out"),
    (Reason.REMOVED, r"HTTP Error (404|410)"),
    (Reason.FORBIDDEN, r"HTTP Error 403"),
    (
        Reason.NETWORK,
        r"HTTP Error 5\d\d|connection|network|getaddrinfo|name resolution|name or service|unreachable|TransportError|"
        r"\bSSL\b|EOF occurred|RemoteDisconnected|IncompleteRead|bytes read",
    ),
    (Reason.REMOVED, r"removed|deleted|no longer available|video (is )?unavailable|not available|does not exist"),
)


class ClipFailure(Exception):
    """A clip that does not come to be: reason and one line of explanation."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


def classify(message: str) -> Reason:
    """The reason that the words of a downloader's error message give."""
    for reason, pattern in PATTERNS:
        if re.search(pattern, message, re.IGNORECASE):
            return reason
    return Reason.OTHER
