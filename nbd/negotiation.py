"""The options of the handshake: what each is answered with, and what it changes.

In: the state that options build up (reply style, contexts, promises made by INFO) and one method per option.
Out: framing and buffering (`handshake`), payload layouts (`options`), context names (`meta_contexts`). Every
method is a generator of events, so a listing of thousands of exports is sent piece by piece.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from .access import Access, PeerIdentity, TlsMode
from .constants import (
    UNPADDED_EXPORT_NAME_ZEROES,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlag,
)
from .device import Export, ExportDirectory, Session
from .errors import OptionInvalid
from .events import Close, Event, Send, StartTls, Transmit
from .limits import Limits
from .meta_contexts import listed, selected
from .options import (
    ContextQuery,
    decode_context_query,
    decode_export_query,
    decode_string,
)
from .terms import SelectedContext, Terms
from .wire import (
    EXPORT_NAME_REPLY,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    U16,
    U32,
    counted_string,
    limited_text,
    option_reply,
)

_PREFERRED_BYTES_MAX = 1024 * 1024  # larger hints make guests choose odd topologies
_LISTING_SEND_BYTES = 32 * 1024


@dataclass(slots=True)
class _Refused(Exception):  # noqa: N818
    """Carries the error reply to one option up to the dispatcher."""

    reply: OptionReply
    text: str


@dataclass(frozen=True, slots=True)
class _Promise:
    """What INFO told about an export; a GO that follows directly must say the same."""

    name: str
    size_bytes: int
    flags: TransmissionFlag


class Negotiation:
    """State and rules of one connection's option haggling."""

    def __init__(
        self, exports: ExportDirectory, tls: TlsMode, access: Access, limits: Limits, *, listing: bool
    ) -> None:
        self._exports = exports
        self._tls = tls
        self._access = access
        self._limits = limits
        self._listing = listing
        self._identity = PeerIdentity()
        self._flags = HandshakeFlag(0)
        self._structured = False
        self._extended = False
        self._contexts: tuple[SelectedContext, ...] = ()
        self._contexts_export: str | None = None
        self._next_context_id = 1
        self._queries = 0
        self._promise: _Promise | None = None
        self._session: Session | None = None
        self.opened: Export | None = None

    @property
    def refuses_plaintext(self) -> bool:
        """Whether everything but STARTTLS and ABORT is answered with TLS_REQD."""
        return self._tls is TlsMode.REQUIRED and not self._identity.tls

    def client_flags(self, flags: HandshakeFlag) -> Iterator[Event]:
        """Take note of the client's flags."""
        self._flags = flags
        if not flags & HandshakeFlag.FIXED_NEWSTYLE and self._tls is TlsMode.REQUIRED:
            yield Close("the client cannot negotiate TLS, which is required")

    def restart_inside_tls(self, identity: PeerIdentity) -> None:
        """Forget what was negotiated in plaintext."""
        self._identity = identity
        self._structured = self._extended = False
        self._promise = None
        self._clear_contexts()

    def abandon(self) -> None:
        """Close a session that was opened and not handed over."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self.opened = None

    def forget_for(self, option: int) -> None:
        """Apply what even an unreadable option does to the state."""
        self._promise = None
        if option == Option.SET_META_CONTEXT:
            self._clear_contexts()

    def option(self, option: int, data: bytes) -> Iterator[Event]:
        """Answer one complete option."""
        promise, self._promise = self._promise, None
        try:
            if self.refuses_plaintext and option not in (Option.STARTTLS, Option.ABORT):
                if option == Option.EXPORT_NAME:
                    yield Close("EXPORT_NAME without TLS, which is required")
                    return
                raise _Refused(OptionReply.ERR_TLS_REQD, "this server requires TLS")
            yield from self._dispatch(option, data, promise)
        except _Refused as refusal:
            yield self._error(option, refusal.reply, refusal.text)
        except OptionInvalid as problem:
            if option == Option.EXPORT_NAME:
                yield Close(str(problem))
            else:
                yield self._error(option, OptionReply.ERR_INVALID, str(problem))

    def _dispatch(self, option: int, data: bytes, promise: _Promise | None) -> Iterator[Event]:
        match option:
            case Option.EXPORT_NAME:
                yield from self._export_name(data)
            case Option.ABORT:
                yield Send(option_reply(option, OptionReply.ACK))
                yield Close(None)
            case Option.LIST:
                yield from self._list(data)
            case Option.STARTTLS:
                yield from self._start_tls(data)
            case Option.INFO | Option.GO:
                yield from self._info_or_go(option, data, promise)
            case Option.STRUCTURED_REPLY | Option.EXTENDED_HEADERS:
                yield self._reply_style(option, data)
            case Option.LIST_META_CONTEXT:
                yield from self._list_contexts(data)
            case Option.SET_META_CONTEXT:
                self._clear_contexts()  # also when the option turns out to be malformed
                yield from self._set_contexts(data)
            case _:
                raise _Refused(OptionReply.ERR_UNSUP, f"option {option} is not known")

    # --- choosing an export
    # -----------------------------------------------------------------------------------

    def _find(self, name: str, *, hide_tls_only: bool = False) -> Export:
        try:
            export = self._exports.find(name)
        except OSError as error:
            raise _Refused(OptionReply.ERR_PLATFORM, f"looking up the export failed: {error}") from None
        if export is None:
            shown = f"there is no export named '{name}'" if name else "this server has no default export"
            raise _Refused(OptionReply.ERR_UNKNOWN, shown)
        if not self._identity.tls and self._tls is TlsMode.OPTIONAL and self._access.tls_only(export.name):
            if hide_tls_only:
                raise _Refused(OptionReply.ERR_UNKNOWN, f"there is no export named '{name}' without TLS")
            raise _Refused(OptionReply.ERR_TLS_REQD, "this export requires TLS")
        if not self._access.allowed(export.name, self._identity):
            raise _Refused(OptionReply.ERR_POLICY, "this client may not use the export")
        return export

    def _transmission_flags(self, export: Export) -> TransmissionFlag:
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.CAN_MULTI_CONN
            | TransmissionFlag.SEND_CACHE
        )
        if export.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= (
                TransmissionFlag.SEND_TRIM
                | TransmissionFlag.SEND_WRITE_ZEROES
                | TransmissionFlag.SEND_FAST_ZERO
            )
        if self._structured or self._extended:
            flags |= TransmissionFlag.SEND_DF
        if self._extended and self._contexts and self._contexts_export == export.name:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _open(self, export: Export, size_bytes: int, flags: TransmissionFlag) -> Terms:
        """Open the export: the last step before the final reply, and the first that touches the device."""
        self.opened = export  # visible before the client can know, so that nobody misses a user of the export
        try:
            self._session = export.open()
        except BaseException:
            self.opened = None
            raise
        return Terms(
            export=export,
            session=self._session,
            size_bytes=size_bytes,
            flags=flags,
            structured=self._structured and not self._extended,
            extended=self._extended,
            contexts=self._contexts if self._contexts_export == export.name else (),
            payload_bytes_max=self._limits.payload_bytes_max,
            read_bytes_max=self._limits.payload_bytes_max,
        )

    def _hand_over(self, terms: Terms) -> Transmit:
        self._session = None
        return Transmit(terms)

    def _export_name(self, data: bytes) -> Iterator[Event]:
        if self._extended:
            yield Close("EXPORT_NAME after EXTENDED_HEADERS")
            return
        try:
            export = self._find(decode_string(data, "export name"))
            terms = self._open(export, export.size_bytes, self._transmission_flags(export))
        except _Refused as refusal:
            yield Close(f"EXPORT_NAME refused: {refusal.text}")
            return
        except OSError as error:
            yield Close(f"EXPORT_NAME failed: {error}")
            return
        padded = not self._flags & HandshakeFlag.NO_ZEROES
        padding = bytes(UNPADDED_EXPORT_NAME_ZEROES) if padded else b""
        yield Send(EXPORT_NAME_REPLY.pack(terms.size_bytes, terms.flags) + padding)
        yield self._hand_over(terms)

    def _info_or_go(self, option: int, data: bytes, promise: _Promise | None) -> Iterator[Event]:
        query = decode_export_query(data)
        export = self._find(query.name)
        fresh = _Promise(export.name, export.size_bytes, self._transmission_flags(export))
        told = fresh
        terms = None
        if option == Option.GO:
            told = self._kept_promise(promise, fresh)
            terms = self._open_for_go(export, told)
        else:
            self._promise = fresh
        yield self._info(option, INFO_EXPORT.pack(InfoType.EXPORT, told.size_bytes, told.flags))
        if InfoType.NAME in query.info_types:
            yield self._info(option, U16.pack(InfoType.NAME) + limited_text(export.name))
        if InfoType.DESCRIPTION in query.info_types and export.description:
            yield self._info(option, U16.pack(InfoType.DESCRIPTION) + limited_text(export.description))
        yield self._info(option, self._block_size(export))
        yield Send(option_reply(option, OptionReply.ACK))
        if terms is not None:
            yield self._hand_over(terms)

    def _kept_promise(self, promise: _Promise | None, fresh: _Promise) -> _Promise:
        """Return what GO has to say after an INFO for the same export, refusing what can no longer be kept."""
        if promise is None or promise.name != fresh.name:
            return fresh
        if fresh.size_bytes < promise.size_bytes or fresh.flags != promise.flags:
            raise _Refused(OptionReply.ERR_PLATFORM, "the export has changed since INFO; ask again")
        return promise

    def _open_for_go(self, export: Export, told: _Promise) -> Terms:
        try:
            return self._open(export, told.size_bytes, told.flags)
        except OSError as error:
            leaving = error.errno == errno.ESHUTDOWN
            reply = OptionReply.ERR_SHUTDOWN if leaving else OptionReply.ERR_PLATFORM
            raise _Refused(reply, f"the export cannot be opened: {error}") from None

    def _block_size(self, export: Export) -> bytes:
        """Encode minimum 1 (the device does the read-modify-write), the preferred unit, and the largest payload."""
        wanted = max(512, min(export.preferred_block_bytes, _PREFERRED_BYTES_MAX))
        preferred = 1 << (wanted.bit_length() - 1)  # a power of two, whatever the pool's block size is
        return INFO_BLOCK_SIZE.pack(InfoType.BLOCK_SIZE, 1, preferred, self._limits.advertised_payload_bytes)

    def _info(self, option: int, payload: bytes) -> Send:
        return Send(option_reply(option, OptionReply.INFO, payload))

    def _error(self, option: int, reply: OptionReply, text: str) -> Send:
        return Send(option_reply(option, reply, limited_text(text)))

    # --- the other options
    # ------------------------------------------------------------------------------------

    def _refuse_data(self, option: int, data: bytes) -> None:
        if data:
            raise _Refused(OptionReply.ERR_INVALID, f"option {option} takes no data")

    def _list(self, data: bytes) -> Iterator[Event]:
        if not self._listing:
            raise _Refused(OptionReply.ERR_POLICY, "this server does not list its exports")
        self._refuse_data(Option.LIST, data)
        gathered = bytearray()
        for name, description in self._exports.listing():
            hidden = self._tls is TlsMode.OPTIONAL and not self._identity.tls and self._access.tls_only(name)
            if hidden or not self._access.allowed(name, self._identity):
                continue
            payload = counted_string(limited_text(name)) + limited_text(description)
            gathered += option_reply(Option.LIST, OptionReply.SERVER, payload)
            if len(gathered) >= _LISTING_SEND_BYTES:
                yield Send(bytes(gathered))
                gathered.clear()
        yield Send(bytes(gathered) + option_reply(Option.LIST, OptionReply.ACK))

    def _start_tls(self, data: bytes) -> Iterator[Event]:
        self._refuse_data(Option.STARTTLS, data)
        if self._identity.tls:
            raise _Refused(OptionReply.ERR_INVALID, "TLS is already in use")
        if self._tls is TlsMode.OFF or not self._flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise _Refused(OptionReply.ERR_POLICY, "this server does not offer TLS")
        yield Send(option_reply(Option.STARTTLS, OptionReply.ACK))
        yield StartTls()

    def _reply_style(self, option: int, data: bytes) -> Send:
        self._refuse_data(option, data)
        if option == Option.EXTENDED_HEADERS:
            if self._extended:
                raise _Refused(OptionReply.ERR_INVALID, "extended headers are already in use")
            self._extended = True
        elif self._extended:
            raise _Refused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are already in use")
        else:
            self._structured = True
        return Send(option_reply(option, OptionReply.ACK))

    # --- meta contexts
    # ----------------------------------------------------------------------------------------

    def _clear_contexts(self) -> None:
        self._contexts = ()
        self._contexts_export = None

    def _context_query(self, data: bytes) -> ContextQuery:
        if not self._structured and not self._extended:
            raise _Refused(
                OptionReply.ERR_INVALID, "meta contexts need structured replies or extended headers"
            )
        query = decode_context_query(data, self._limits.queries_max)
        if query is not None:
            self._queries += len(query.queries)
        if query is None or (query.queries and self._queries > self._limits.queries_max):
            raise _Refused(OptionReply.ERR_TOO_BIG, f"more than {self._limits.queries_max} queries")
        return query

    def _context_reply(self, option: Option, context_id: int, name: str) -> bytes:
        return option_reply(option, OptionReply.META_CONTEXT, U32.pack(context_id) + name.encode())

    def _list_contexts(self, data: bytes) -> Iterator[Event]:
        query = self._context_query(data)
        export = self._find(query.export_name, hide_tls_only=True)
        for name in listed(export, query.queries):
            yield Send(self._context_reply(Option.LIST_META_CONTEXT, 0, name))
        yield Send(option_reply(Option.LIST_META_CONTEXT, OptionReply.ACK))

    def _set_contexts(self, data: bytes) -> Iterator[Event]:
        query = self._context_query(data)
        export = self._find(query.export_name, hide_tls_only=True)
        names = selected(export, query.queries)
        if len(names) > self._limits.contexts_max:
            raise _Refused(OptionReply.ERR_TOO_BIG, f"more than {self._limits.contexts_max} contexts")
        first, self._next_context_id = self._next_context_id, self._next_context_id + len(names)
        contexts = tuple(SelectedContext(first + index, name) for index, name in enumerate(names))
        self._contexts, self._contexts_export = contexts, export.name
        for context in contexts:
            yield Send(self._context_reply(Option.SET_META_CONTEXT, context.context_id, context.name))
        yield Send(option_reply(Option.SET_META_CONTEXT, OptionReply.ACK))
