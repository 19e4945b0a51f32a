"""Publish the files of a build in their order, and the record of a failed build; proof/publish.py uploads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.planning import device_code, licences
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.planning.stack import Stack
from builder.proof import build_tag, certificates, publish, record, why
from builder.proof.record import Publication, Record
from gracefarm.console import Console
from gracefarm.errors import PublishError
from gracefarm.files import sha256_file

MAX_TAGS = 20
"Number of names to try."


def refuse_objects(stack: Stack) -> None:
    """Refuse to publish wheels of a stack that has only headers.

    Raises:
        PublishError: the stack has only headers.
    """
    if stack.objects_only:
        raise PublishError(
            f"stack {stack.name} has only headers, so its wheels cannot be loaded and are not published",
            remedy="omit --publish, or build against a stack with libraries (--stack)",
        )


def refuse_licence(recipe: LoadedRecipe) -> None:
    """Refuse to publish under a licence that does not allow redistribution, unless the recipe has `may_publish`.

    Raises:
        PublishError: redistribution is not allowed.
    """
    data = recipe.data
    if data.wheel.may_publish is None and not licences.redistributable(data.license):
        raise PublishError(
            f"the licence of {recipe.key}, {data.license}, does not allow redistribution of its wheel",
            remedy="build the wheel without --publish; if the owner of the package allows redistribution, add the reason "
            "as may_publish to [wheel] in the recipe",
        )


def refuse_tree(recipe: LoadedRecipe) -> None:
    """Refuse to publish a tree, since an index has only wheels.

    Raises:
        PublishError: the recipe builds a tree.
    """
    if recipe.data.tree is not None:
        raise PublishError(
            f"recipe {recipe.key} builds no wheel, but a folder of files (a tree) for other recipes; a tree cannot be "
            "published",
            remedy="omit --publish",
        )


def publish_build(built: Record, url: str, settings: Settings, console: Console) -> Record:
    """Publish wheel, record and log with one login. A wheel that a gate refused never gets here.

    Raises:
        PublishError: the index refuses the login or the wheel.
    """
    login = publish.credentials(url)
    published = _publish_wheel(built, url, settings, console, login)
    send_record(published.build_id, url, settings, console, login)
    _send_certificates([published], url, settings, console, login)
    return published


def publish_matrix(content: Mapping[str, object], url: str) -> None:
    """Publish the cells of a matrix to the index with that upload URL.

    Raises:
        UsageError: the URL contains a password.
        PublishError: the index refuses the login or the matrix.
    """
    publish.refuse_credentials(url)
    refused = publish.send_matrix(content, url, publish.credentials(url))
    if refused is not None:
        raise PublishError(
            f"the matrix was not published: {refused}",
            remedy=publish.REMEDY,
        )


def publish_certificates(builds: list[Record], url: str, settings: Settings, console: Console) -> None:
    """Publish the certificates that are valid for these builds, and the builds' records, which now name them.

    Raises:
        PublishError: the index refuses the login.
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
        message = f"certificate {digest[:16]} to {url}" if refused is None else f"the certificate was not published: {refused}"
        console.step("publish", message)


def _publish_wheel(built: Record, url: str, settings: Settings, console: Console, login: publish.Login | None) -> Record:
    """Upload the record's wheel, unless the record has its publication."""
    if any(publication.url == url for publication in built.published):
        console.step("publish", f"{url} already has this wheel")
        return built
    wheel = record.wheel_path(settings, built)
    assert wheel is not None
    for archive in sorted(wheel.parent.glob("*.tar.gz")):
        # The source goes first, so that the wheel is never offered without it.
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
    """Upload a build's wheel; with the next build tag if other bytes have its name.

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
            # The file is not visible: deleted, in a staged set, or being uploaded.
            before, filename = filename, build_tag.tagged(wheel.name, build_tag.split(filename)[1] + 1)
            continue
        reason = (
            f"{filename} has a build tag because {_why(before, built, url, settings, login)}" if before is not None else ""
        )
        return publication.model_copy(update={"filename": "" if filename == wheel.name else filename, "reason": reason})
    raise PublishError(
        f"{url} refused {wheel.name} under {MAX_TAGS} names, up to {before}: the index has, or had, a "
        "different file with each of these names",
        remedy="change the version in the recipe, so that the names are new",
    )


def _upload_as(filename: str, wheel: Path, url: str, login: publish.Login | None) -> Publication:
    if filename == wheel.name:
        return publish.upload(wheel, url, login)
    with TemporaryDirectory(prefix="gracefarm-publish-") as folder:
        named = Path(folder) / filename
        named.symlink_to(wheel.resolve())
        return publish.upload(named, url, login)


def _refuse_other_cell(built: Record, filename: str, before: str, url: str, login: publish.Login | None) -> None:
    """Refuse a wheel for other GPUs than the existing one: installers would use the newer build for all GPUs."""
    stack = built.inputs["stack"]
    own, there = (tuple(stack["sm"]) if isinstance(stack, dict) else ()), publish.offered_sm(before, url, login)
    if own and there and set(own) != set(there):
        theirs, every = device_code.parse("+".join(there)), device_code.parse("+".join((*own, *there)))
        raise PublishError(
            f"{url} has {before} for sm {', '.join(theirs)}, but this {filename} is for sm {', '.join(own)}: installers "
            "would use the newer wheel for all GPUs",
            remedy=f"build one wheel for all architectures (--sm {'+'.join(every)}), or build a variant wheel for each "
            "architecture (--variant)",
        )


def _why(before: str, built: Record, url: str, settings: Settings, login: publish.Login | None) -> str:
    """Why another build has the same name, as far as it is known on this machine."""
    sha256 = publish.offered(before, url, login).get(before)
    if sha256 is None:
        return f"{before} exists or existed with other bytes"
    there = f"{before} exists with other bytes (sha256 {sha256[:16]}"
    known = next((other for other in record.all_of(settings) if other.wheel and other.wheel.sha256 == sha256), None)
    changed = [change.path for change in why.changes(known.inputs, built.inputs)] if known else []
    if known is None or not changed:
        return f"{there})"
    return f"{there}, from build {known.build_id[:16]}); inputs that changed since that build: {', '.join(changed)}"


def send_record(build_id: str, url: str, settings: Settings, console: Console, login: publish.Login | None) -> None:
    """Send record and log to an index that keeps them; for a build without a wheel, nothing else is sent."""
    folder = record.folder(settings, build_id)
    refused = publish.send_record(record.path(settings, build_id), folder / "log.txt", build_id, url, login)
    console.step("publish", f"record and log to {url}" if refused is None else f"the record was not published: {refused}")


def send_failure(build_id: str, url: str, settings: Settings, console: Console) -> None:
    """Send the record of a failed build. A refused login is only reported, so that it does not hide the build's error."""
    try:
        login = publish.credentials(url)
    except PublishError as error:
        console.step("publish", f"the record was not published: {error.cause}")
        return
    send_record(build_id, url, settings, console, login)
