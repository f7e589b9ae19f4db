"""The packages of ``requirements.lock`` as a software bill of materials: ``python -m pipelines.sbom > sbom.cdx.json``.

CycloneDX 1.6 in JSON, the same bytes for the same lock, made without a network. torch, which the lock leaves to the machine, is added as installed.
"""

import json
import re
import sys
import uuid
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from alignflow_core.errors import InputError, exit_code

ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)\s*(?:;\s*(?P<marker>[^\\]+?))?\s*\\?$")


def bill(lock: Path) -> dict[str, Any]:
    """CycloneDX document of a lock file with hashes.

    Raises:
        InputError: not such a file.
    """
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{lock}: cannot be read ({error.strerror}); run 'make lock'") from error
    components: list[dict[str, Any]] = []
    for line in text.splitlines():
        entry = ENTRY.match(line)
        if entry:
            components.append(_component(entry["name"], entry["version"], entry["marker"]))
        elif line.strip().startswith("--hash=sha256:") and components:
            components[-1].setdefault("hashes", []).append({"alg": "SHA-256", "content": line.strip().removeprefix("--hash=sha256:").split()[0]})
    if not components:
        raise InputError(f"{lock}: names no package; run 'make lock'")
    components += [_component("torch", version("torch"), None)] if _installed("torch") else []
    product = {"type": "application", "name": "alignflow", "version": version("alignflow") if _installed("alignflow") else "unknown"}
    body = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": product},
            "components": sorted(components, key=lambda each: each["bom-ref"])}
    return {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(body, sort_keys=True))}", **body}


def _component(name: str, number: str, marker: str | None) -> dict[str, Any]:
    """A package; its licence where it is installed and says one."""
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{number.replace('+', '%2B')}"
    found: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}
    if marker:
        found["properties"] = [{"name": "alignflow:marker", "value": marker.strip()}]
    licence = metadata(name).json.get("license_expression") if _installed(name) else None
    return found | ({"licenses": [{"expression": licence}]} if licence else {})


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main() -> int:
    """Print the bill of the lock file in this folder."""
    print(json.dumps(bill(Path("requirements.lock")), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
