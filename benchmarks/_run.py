"""A benchmark without the command line and what it needs: python benchmarks/_run.py NAME JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(name: str, out: Path, quick: bool) -> None:
    result = importlib.import_module(name).run(quick)
    out.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(
            " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items())
        )
    for bar in result["bars"]:
        verdict = "yes" if bar["holds"] else "NO"
        print(f"{verdict:4} {bar['what']}: {bar['value']:.4g} (wanted {bar['bar']})")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--quick" in sys.argv[3:])
