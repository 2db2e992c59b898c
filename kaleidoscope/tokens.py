"""API tokens: made for a person in a business, shown once, kept as a hash, checked, revoked."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta

from sqlalchemy import select

from kaleidoscope.access import Caller, check_user
from kaleidoscope.database import Session
from kaleidoscope.errors import InputError, NotFoundError, UnauthenticatedError
from kaleidoscope.tables import ApiToken, now
from kaleidoscope.vocabulary import Role

PREFIX = "kld_"
TOKEN_DAYS = 90
MAX_TOKEN_DAYS = 3650
MIN_TOKEN_LIFE_S = 60
DAY_S = 86_400


def create_token(
    session: Session, user: str, roles: frozenset[Role], *, days: float = TOKEN_DAYS, installation: bool = False
) -> tuple[ApiToken, str]:
    """A new token of the session's business, and its text, which is never shown again.

    Raises InputError for a user that cannot be a name (`access.check_user`), no role, or a life that is not between one
    minute and ten years.
    """
    caller = session.caller
    if installation:
        caller.require_installation()
    caller.require(Role.ADMIN)
    if not user.strip():
        raise InputError("user: say whose token it is.")
    user = check_user(user)
    if not roles:
        raise InputError(f"roles: give at least one of {', '.join(Role)}.")
    if not MIN_TOKEN_LIFE_S / DAY_S <= days <= MAX_TOKEN_DAYS:
        raise InputError(f"days: {days:g} is not between one minute (0.0007) and ten years ({MAX_TOKEN_DAYS}).")
    secret = PREFIX + secrets.token_urlsafe(32)
    token = ApiToken(
        id=secrets.token_hex(8),
        business_id=None if installation else session.business,
        user=user,
        token_hash=secret_hash(secret),
        roles=sorted(roles),
        expires_at=now() + timedelta(days=days),
    )
    session.add(token)
    session.flush()
    return token, secret


def authenticate(session: Session, secret: str) -> Caller:
    """Whose token this is; raises UnauthenticatedError for one that is unknown, expired or revoked."""
    # 256 random bits need no slow hash: there is nothing to guess.
    token = session.scalar(select(ApiToken).where(ApiToken.token_hash == secret_hash(secret)))
    if token is None or token.revoked_at is not None:
        raise UnauthenticatedError("This token is unknown or was revoked. Ask an admin for a new one.")
    if token.expires_at is not None and token.expires_at <= datetime.now(UTC):
        raise UnauthenticatedError("This token has expired. Ask an admin for a new one.")
    roles = frozenset(Role(role) for role in token.roles)
    return Caller(token.user, token.business_id, roles, token.id, installation=token.business_id is None)


def list_tokens(session: Session) -> list[ApiToken]:
    """The tokens of the session's business (of the installation, without one), newest first."""
    session.caller.require(Role.ADMIN)
    mine = ApiToken.business_id == session.caller.business
    return list(session.scalars(select(ApiToken).where(mine).order_by(ApiToken.created_at.desc(), ApiToken.id)))


def revoke_token(session: Session, token_id: str) -> ApiToken:
    """End a token of the session's business now; ending it twice changes nothing."""
    session.caller.require(Role.ADMIN)
    token = session.get(ApiToken, token_id)
    if token is None or token.business_id != session.caller.business:
        raise NotFoundError(f"There is no token {token_id!r} in this business.")
    token.revoked_at = token.revoked_at or now()
    session.flush()
    return token


def secret_hash(secret: str) -> str:
    """What is kept of a token's text."""
    return hashlib.sha256(secret.encode()).hexdigest()
