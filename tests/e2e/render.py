"""The chart with these values, as kubectl takes it. With Helm's own engine, as `make chart` uses it.

usage: render.py VALUES-AS-JSON
"""

import json
import pathlib
import sys

import helm_python as helm

CHART = pathlib.Path(__file__).resolve().parents[2] / "deploy/chart"
values = json.loads(sys.argv[1])
with helm.Chart.load(str(CHART)) as chart:
    chart.validate_schema(values)
    rendered = chart.render(values=values, name="flatwire", namespace="kube-system")
print("\n---\n".join(text for path, text in sorted(rendered.items()) if path.endswith(".yaml") and text.strip()))
