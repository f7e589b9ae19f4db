"""The edge of AlignFlow: the only package that knows Hydra, Dagster, DVC and MLflow."""

import os

# No part of this product or of what it stands on reports home unless the user asks for it.
for _variable, _off in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("DAGSTER_DISABLE_TELEMETRY", "1"), ("DVC_NO_ANALYTICS", "1")):
    os.environ.setdefault(_variable, _off)
