"""Judge an adapter: a policy fixed beforehand plus the evidence gives a decision with a reason per rule.

Each rule of the policy looks at one number and says pass, fail or inconclusive. A failure of any required rule holds
the adapter; else a required rule that is inconclusive makes the decision inconclusive; else it ships. A rule passes
if the confidence interval clears its threshold as a whole, fails if the interval misses it as a whole, and is
inconclusive between, with the number of items that would decide.

``policy`` holds the thresholds and rules, ``evidence`` turns records into named measures, ``verdict`` finds intervals
and corrects them for the number of rules, ``words`` says what came out. Pure functions: no file is read, no score
computed, no model started.
"""

from tunegate.gate.evidence import Evidence
from tunegate.gate.policy import FAIL, HOLD, INCONCLUSIVE, PASS, SHIP, Policy, RuleSetting
from tunegate.gate.verdict import decide, foreseen, verdict_of

__all__ = [
    "FAIL", "HOLD", "INCONCLUSIVE", "PASS", "SHIP", "Evidence", "Policy", "RuleSetting", "decide", "foreseen",
    "verdict_of",
]  # fmt: skip
