"""The frame of a report: one HTML page with its style in it, and nothing fetched or executed."""

from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf8; --card: #f5f3ee; --ink: #21201d; --soft: #6e6b64; --rule: #e3e0d8;
  --c0: #2a66a8; --c1: #c04f15; --c2: #2f7d4f; --c3: #7b4fa3;
  --c4: #94700a; --c5: #117a7c; --c6: #b23a69; --c7: #6e6b64;
  --right: #2f7d4f; --wrong: #b3372f;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1c1f23; --ink: #e6e4df; --soft: #9d9b95; --rule: #30343a;
    --c0: #7fb2e8; --c1: #f0965a; --c2: #7cc596; --c3: #bf9fe0;
    --c4: #d6b54c; --c5: #5fc3c2; --c6: #ec90b4; --c7: #a3a19b;
    --right: #7cc596; --wrong: #f08a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 78rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 var(--sans); font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%; print-color-adjust: exact;
}
h1, h2 { font-family: var(--serif); font-weight: 500; line-height: 1.15; text-wrap: balance; }
h1 { font-size: clamp(1.9rem, 5vw, 3rem); margin: .4rem 0 1rem; max-width: 22em; }
h1 em { font-style: normal; color: var(--c1); white-space: nowrap; }
h2 { font-size: 1.6rem; margin: 3.5rem 0 .3rem; padding-top: 1.4rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; font-weight: 600; margin: 2rem 0 .6rem; }
p { max-width: 46rem; margin: .4rem 0 1rem; }
.soft, .kicker, figcaption span, dt, th, footer { color: var(--soft); }
.kicker { margin: 0; letter-spacing: .02em; }
.wide { display: block; width: 100%; max-width: 46rem; margin: 1.2rem 0 .4rem;
  overflow: visible; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr));
  gap: 1.1rem 2rem; margin: 1.6rem 0 0; }
.facts div { border-top: 2px solid var(--ink); padding-top: .45rem; }
dt { font-size: .85rem; }
dd { margin: 0; font-size: 1.3rem; font-family: var(--serif); }
dd small { display: block; font: .85rem/1.4 var(--sans); color: var(--soft); }
.facts + p { margin-top: 1.6rem; }
.warnings { border-left: 3px solid var(--c1); padding: .2rem 0 .2rem 1rem; margin: 1.8rem 0 0;
  list-style: none; max-width: 52rem; }
.warnings li + li { margin-top: .6rem; }
.warnings b { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr));
  gap: 1.4rem 2rem; }
figure { margin: 0; min-width: 0; max-width: 32rem; }
figcaption { font-size: .85rem; line-height: 1.35; min-height: 2.9em; }
figcaption b { display: block; font-weight: 600; font-size: .95rem; }
figure.broad { grid-column: 1 / -1; max-width: 56rem; }
figure.broad figcaption { min-height: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .label { font-weight: 600; fill: var(--c); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .zero { stroke: var(--soft); stroke-width: 1; opacity: .6; }
svg .limit { stroke: var(--wrong); stroke-width: 1; stroke-dasharray: 3 3; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
svg .dashed { stroke-dasharray: 6 3; }
svg .raw { fill: none; stroke: var(--c); stroke-width: 1; opacity: .3; stroke-linejoin: round; }
svg .band { fill: var(--c); opacity: .16; }
svg .dot { fill: var(--c); stroke: var(--paper); stroke-width: 1; }
.tip rect { fill: transparent; }
.tip .cursor { stroke: var(--ink); stroke-width: 1; opacity: 0; }
.tip:hover .cursor { opacity: .45; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.wide text { font-size: 14px; }
.wide .before { --c: var(--soft); } .wide .after { --c: var(--c1); }
.wide .span { stroke: var(--c); stroke-width: 3; opacity: .45; stroke-linecap: round; }
.wide circle { fill: var(--c); }
.chip { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  background: var(--c); margin-right: .5em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .92rem; }
th, td { text-align: left; padding: .4rem 1.6rem .4rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; white-space: nowrap; }
th { font-weight: 500; }
td.n, th.n { text-align: right; }
tr.sum td { font-weight: 600; border-bottom: 0; }
.bar { display: flex; height: .8rem; max-width: 46rem; margin: .6rem 0 .5rem; gap: 2px; }
.bar i { background: var(--c); min-width: 1px; }
.key { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0 0 1rem;
  max-width: none; }
.flows td { padding-right: 2.2rem; }
.problem { padding: 1.1rem 0 1.3rem; border-bottom: 1px solid var(--rule); break-inside: avoid; }
.problem:last-child { border-bottom: 0; }
.problem > pre { color: var(--soft); max-height: 9rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .5rem; }
.answer { background: var(--card); border-radius: 4px; padding: .7rem .9rem; min-width: 0; }
.answer p { margin: 0 0 .4rem; font-size: .85rem; color: var(--soft); }
.answer pre { max-height: 22rem; }
.right, .wrong { font-weight: 600; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
pre { font: .85rem/1.5 var(--mono); margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  overflow-y: auto; }
pre.command { background: var(--card); border-radius: 4px; padding: .7rem .9rem; }
pre.settings { columns: 24rem; column-gap: 2.5rem; font-size: .78rem; }
td code { white-space: normal; overflow-wrap: anywhere; }
code { font: .92em var(--mono); overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule);
  font-size: .85rem; }
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .pair { grid-template-columns: 1fr; }
  .facts { grid-template-columns: 1fr 1fr; gap: 1rem 1.2rem; }
  .wide text { font-size: 22px; }
  figcaption { min-height: 0; }
  td, th { padding-right: 1.1rem; }
}
@media print {
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; background: none; font-size: 10pt; }
  .charts { grid-template-columns: repeat(2, 1fr); }
  .charts, figure, .problem, tr { break-inside: avoid; }
  .charts { break-inside: auto; }
  h2, h3 { break-after: avoid; }
  pre, .answer pre, .problem > pre { max-height: none; overflow: visible; }
  .answer, pre.command { border: 1px solid var(--rule); }
}
"""


def page(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )
