"""What is published of a build and in which order, also the record of one that failed; proof/publish.py uploads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.planning import licences
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.planning.stack import Stack
from builder.proof import build_tag, certificates, publish, record, why
from builder.proof.record import Publication, Record
from gracefarm.console import Console
from gracefarm.errors import PublishError
from gracefarm.files import sha256_file

MAX_TAGS = 20
"Names that are tried."


def refuse_objects(stack: Stack) -> None:
    """A stack of headers makes objects to look at, not wheels to give away.

    Raises:
        PublishError: the stack is such a one.
    """
    if stack.objects_only:
        raise PublishError(
            f"stack {stack.name} has headers alone: what it builds cannot be loaded and is not published",
            remedy="build against a stack that has the libraries",
        )


def refuse_licence(recipe: LoadedRecipe) -> None:
    """A licence that does not allow passing on is not published unless the recipe says why it may be.

    Raises:
        PublishError: it does not.
    """
    data = recipe.data
    if data.wheel.may_publish is None and not licences.redistributable(data.license):
        raise PublishError(
            f"the licence of {recipe.key}, {data.license}, does not allow that its wheel is passed on",
            remedy="build it without --publish; if its maker allows it, say so with may_publish under [wheel] of the recipe",
        )


def refuse_tree(recipe: LoadedRecipe) -> None:
    """An index has wheels.

    Raises:
        PublishError: the recipe makes a tree.
    """
    if recipe.data.tree is not None:
        raise PublishError(f"{recipe.key} makes a tree for other recipes, which no index takes", remedy="leave --publish out")


def publish_build(built: Record, url: str, settings: Settings, console: Console) -> Record:
    """Wheel, record and log with one login; a wheel that failed a gate has no path to here.

    Raises:
        PublishError: the index gives no login, or takes no wheel.
    """
    login = publish.credentials(url)
    published = _publish_wheel(built, url, settings, console, login)
    send_record(published.build_id, url, settings, console, login)
    _send_certificates([published], url, settings, console, login)
    return published


def publish_matrix(content: Mapping[str, object], url: str) -> None:
    """The cells of a matrix, for the board of the index behind the upload address.

    Raises:
        UsageError: the address carries a password.
        PublishError: the index gives no login, or does not take them.
    """
    publish.refuse_credentials(url)
    refused = publish.send_matrix(content, url, publish.credentials(url))
    if refused is not None:
        raise PublishError(
            f"the index did not take the matrix: {refused}",
            remedy="check the address and the token (TWINE_USERNAME=__token__, TWINE_PASSWORD)",
        )


def publish_certificates(builds: list[Record], url: str, settings: Settings, console: Console) -> None:
    """The certificates that hold for these builds, and the builds' records, which now name them.

    Raises:
        PublishError: the index gives no login.
    """
    login = publish.credentials(url)
    for build in builds:
        if any(publication.url == url for publication in build.published):
            send_record(build.build_id, url, settings, console, login)
    _send_certificates(builds, url, settings, console, login)


def _send_certificates(
    builds: list[Record], url: str, settings: Settings, console: Console, login: publish.Login | None
) -> None:
    known = {certificate.device_digest for build in builds for certificate in certificates.of_record(build, settings)}
    for digest in sorted(known):
        refused = publish.send_certificate(certificates.path(settings, digest), digest, url, login)
        said = f"certificate {digest[:16]} to {url}" if refused is None else f"the index keeps no certificate: {refused}"
        console.step("publish", said)


def _publish_wheel(built: Record, url: str, settings: Settings, console: Console, login: publish.Login | None) -> Record:
    """Upload the record's wheel unless the record says that it was."""
    if any(publication.url == url for publication in built.published):
        console.step("publish", f"{url} has it already")
        return built
    wheel = record.wheel_path(settings, built)
    assert wheel is not None
    for archive in sorted(wheel.parent.glob("*.tar.gz")):
        # The source goes first: no moment in which the wheel is offered without it.
        publish.upload(archive, url, login)
        console.step("publish", f"{archive.name} to {url}")
    publication = upload_wheel(built, wheel, url, settings, login)
    console.step("publish", f"{publication.filename or wheel.name} to {url}")
    if publication.reason:
        console.step("publish", publication.reason)
    updated = built.model_copy(update={"published": (*built.published, publication)})
    record.write(updated, settings)
    return updated


def upload_wheel(built: Record, wheel: Path, url: str, settings: Settings, login: publish.Login | None) -> Publication:
    """Upload a build's wheel; where other bytes have its name, with the next build tag.

    Raises:
        PublishError: the index refuses it, or has a wheel of that name for other architectures.
    """
    filename, before = build_tag.choose(wheel.name, sha256_file(wheel), publish.offered(wheel.name, url, login))
    if before is not None:
        _refuse_other_cell(built, wheel.name, before, url, login)
    for _ in range(MAX_TAGS):
        try:
            publication = _upload_as(filename, wheel, url, login)
        except publish.TakenError:
            # Of a file that nobody is shown: deleted, in a set that is only staged, or uploaded at this moment.
            before, filename = filename, build_tag.tagged(wheel.name, build_tag.split(filename)[1] + 1)
            continue
        reason = f"build tag of {filename}: {_why(before, built, url, settings, login)}" if before is not None else ""
        return publication.model_copy(update={"filename": "" if filename == wheel.name else filename, "reason": reason})
    raise PublishError(
        f"{url} has {wheel.name} with other bytes, and with each build tag up to {filename}",
        remedy="give the recipe a version of its own",
    )


def _upload_as(filename: str, wheel: Path, url: str, login: publish.Login | None) -> Publication:
    if filename == wheel.name:
        return publish.upload(wheel, url, login)
    with TemporaryDirectory(prefix="gracefarm-publish-") as folder:
        named = Path(folder) / filename
        named.symlink_to(wheel.resolve())
        return publish.upload(named, url, login)


def _refuse_other_cell(built: Record, filename: str, before: str, url: str, login: publish.Login | None) -> None:
    """A wheel for other GPUs is no newer build of the one that is there: installers would take it for all of them."""
    stack = built.inputs["stack"]
    own, there = (tuple(stack["sm"]) if isinstance(stack, dict) else ()), publish.offered_sm(before, url, login)
    if own and there and set(own) != set(there):
        raise PublishError(
            f"{url} has {before} for sm {', '.join(there)}, and this {filename} is for sm {', '.join(own)}: "
            "installers would take the newer one for all GPUs",
            remedy="build one wheel for all of them (--sm 90+100), or label each (--variant)",
        )


def _why(before: str, built: Record, url: str, settings: Settings, login: publish.Login | None) -> str:
    """Why another build of the same name is there, as far as this machine knows it."""
    sha256 = publish.offered(before, url, login).get(before)
    if sha256 is None:
        return f"{before} is or was there with other bytes"
    there = f"{before} is there with sha256 {sha256[:16]}"
    known = next((other for other in record.all_of(settings) if other.wheel and other.wheel.sha256 == sha256), None)
    changed = [change.path for change in why.changes(known.inputs, built.inputs)] if known else []
    if known is None or not changed:
        return there
    return f"{there}, of build {known.build_id[:16]}; since then changed: {', '.join(changed)}"


def send_record(build_id: str, url: str, settings: Settings, console: Console, login: publish.Login | None) -> None:
    """Record and log to an index that keeps them: the only way in which it learns of a build that left no wheel."""
    folder = record.folder(settings, build_id)
    refused = publish.send_record(record.path(settings, build_id), folder / "log.txt", build_id, url, login)
    console.step("publish", f"record and log to {url}" if refused is None else f"the index keeps no record: {refused}")


def send_failure(build_id: str, url: str, settings: Settings, console: Console) -> None:
    """The same for a build that failed; that the index gives no login is said, and hides no error of the build."""
    try:
        login = publish.credentials(url)
    except PublishError as error:
        console.step("publish", f"the index keeps no record: {error.cause}")
        return
    send_record(build_id, url, settings, console, login)
