"""What is published of a build and in which order, also the record of one that failed; proof/publish.py uploads."""

from __future__ import annotations

from collections.abc import Mapping

from builder.planning import licences
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.planning.stack import Stack
from builder.proof import certificates, publish, record
from builder.proof.record import Publication, Record
from gracefarm.console import Console
from gracefarm.errors import PublishError


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
    publication: Publication = publish.upload(wheel, url, login)
    console.step("publish", f"{wheel.name} to {url}")
    updated = built.model_copy(update={"published": (*built.published, publication)})
    record.write(updated, settings)
    return updated


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
