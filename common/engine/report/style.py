"""The style of report.html."""

STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #e2e2e2; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
  max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 10px; }
header p, section p, footer, small, figcaption { color: var(--soft); }
header p { margin: 4px 0 0; }
section { margin-top: 30px; padding-top: 18px; border-top: 1px solid var(--line); }
section p { font-size: 13px; margin: 8px 0; }
footer { margin-top: 36px; font-size: 12px; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
.tiles div { flex: 1 1 130px; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; }
.tiles b { display: block; font-size: 22px; font-weight: 600; }
.tiles span { font-size: 12px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 12px 5px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  font-weight: normal; }
thead th { color: var(--soft); font-size: 12px; }
table.numbers td, table.numbers thead th + th { text-align: right; padding-left: 22px;
  font-variant-numeric: tabular-nums; }
table.bars td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: inline-block; height: 9px; margin-right: 8px; background: #0072B2; border-radius: 2px; }
.columns { display: flex; flex-wrap: wrap; gap: 10px 60px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 22px; }
figure { margin: 0; }
.charts figcaption { font-weight: 600; color: var(--ink); font-size: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; min-height: 20px; }
svg.chart { width: 100%; height: auto; }
svg.chart text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft); }
svg.chart .grid { stroke: var(--line); }
svg.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
table.confusion { font-size: 12px; font-variant-numeric: tabular-nums; }
table.confusion td { min-width: 30px; height: 26px; padding: 2px 4px; text-align: center; border: 1px solid #fff;
  background: #f6f6f6; vertical-align: middle; }
table.confusion th { padding: 2px 8px 2px 0; border: 0; white-space: nowrap; vertical-align: middle; }
table.confusion thead th { text-align: center; padding: 2px 4px; vertical-align: bottom; }
table.confusion.long thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
table.confusion td.sum { background: none; color: var(--soft); padding-left: 10px; text-align: right; }
.worst { display: flex; flex-wrap: wrap; gap: 16px; }
.worst figure { width: 128px; }
.worst img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; background: #f6f6f6; }
.worst figcaption { font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.worst figcaption b { color: #B04A00; font-weight: 600; }
code, pre { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: 12px; border-radius: 6px; white-space: pre-wrap; margin: 0; }
summary { cursor: pointer; font-size: 14px; }
@media print { section { break-inside: avoid; } }
"""
