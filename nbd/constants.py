"""Numbers of the NBD protocol, under the names its specification uses.

In: magics, flags, options, replies, commands, chunk types and the closed set of errors. Out: how they are
laid out on the wire (`wire`) and what the server does about them. Section names refer to the protocol
document (`doc/proto.md` of the NBD project, with its extended-headers extension).
"""

from enum import IntEnum, IntFlag

# "Protocol phases": handshake magics.
INIT_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9

# "Transmission": one magic per message form.
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

DEFAULT_PORT = 10809  # IANA

STRING_BYTES_MAX = 4096  # "Values": no string on the wire may be longer
UNPADDED_EXPORT_NAME_ZEROES = 124  # NBD_OPT_EXPORT_NAME without NBD_FLAG_C_NO_ZEROES


class HandshakeFlag(IntFlag):
    """Flags of the greeting (NBD_FLAG_*); the client's have the same two bits (NBD_FLAG_C_*)."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(IntFlag):
    """What an export can do (NBD_FLAG_*)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class CommandFlag(IntFlag):
    """Modifiers of one request (NBD_CMD_FLAG_*)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Option(IntEnum):
    """Handshake options (NBD_OPT_*). 4 is the withdrawn PEEK_EXPORT and counts as unknown."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """Answers to options (NBD_REP_*)."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


OPTION_REPLY_ERROR_BIT = 0x80000000


class InfoType(IntEnum):
    """Details sent in answer to INFO and GO (NBD_INFO_*)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Requests of the transmission phase (NBD_CMD_*). 8 (RESIZE) is reserved and counts as unknown."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class ChunkType(IntEnum):
    """Kinds of structured and extended reply chunks (NBD_REPLY_TYPE_*)."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_ERROR_BIT = 0x8000
CHUNK_DONE = 1  # NBD_REPLY_FLAG_DONE


class Errno(IntEnum):
    """The closed set of error numbers on the wire; fixed values, whatever the host's own are."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class AllocationState(IntFlag):
    """Status bits of the `base:allocation` context."""

    HOLE = 1
    ZERO = 2


BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
DIRTY_BITMAP_PREFIX = "qemu:dirty-bitmap:"
