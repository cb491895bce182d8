"""What a verifier says of a finished text, for the method: a number, or why the row fails."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from tessy_hf.errors import RequestError
from tessy_hf.method.methods import Verify
from tessy_hf.run.metering import Meter
from tessy_hf.verifiers.verifiers import Verifier


def verify_with(verifier: Verifier, key: str, inputs: Mapping[str, Any], meter: Meter) -> Verify:
    """Return a function that judges finished texts of one row.

    Args:
        verifier: Run in a thread.
        key: The row's id, for errors.
        inputs: The row's input columns.
        meter: Where the verifier's time counts.
    """

    async def verify(written: Mapping[str, Any]) -> float:
        answer = asyncio.to_thread(verifier, {**inputs, **written})
        try:
            verdict = await meter.wait(answer, "the verifier", of="verifier", row=key)
        except RequestError:
            raise
        except Exception as error:  # noqa: BLE001 - a verifier may be anybody's code
            raise RequestError(
                f"Row {key!r}: the verifier raised {type(error).__name__}: {error}. Fix the verifier or the column it "
                "reads."
            ) from error
        if isinstance(verdict, (bool, int, float)) and math.isfinite(verdict):
            return float(verdict)
        raise RequestError(
            f"Row {key!r}: the verifier returned {verdict!r} ({type(verdict).__name__}). True, False or a finite "
            "number is expected, where 1 means right."
        )

    return verify
