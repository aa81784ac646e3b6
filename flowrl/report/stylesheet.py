"""The report's style sheet: one column on a phone, up to three on a desk, light, dark and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1d2329; --muted: #5a6572; --rule: #d5dbe1;
  --good: #08704f; --bad: #b3263e; --good-back: #e3f4ec; --bad-back: #fbe9ec;
  --note-back: #fff6dc; --note-edge: #c29a1b;
  --series-1: #0b62a4; --series-2: #c2500c; --series-3: #087f5f; --series-4: #9a3f86;
  --series-5: #866a00; --series-6: #5f6b7a; --series-7: #b3263e;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #12161b; --card: #1a2027; --ink: #e6eaee; --muted: #a0abb7; --rule: #37414c;
  --good: #6fd3a8; --bad: #ff96a3; --good-back: #163528; --bad-back: #431c24;
  --note-back: #352c10; --note-edge: #c29a1b;
  --series-1: #6bb2f0; --series-2: #f29a5c; --series-3: #55c79f; --series-4: #dc8dcb;
  --series-5: #d3b648; --series-6: #9daab8; --series-7: #ff8b99;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 24px 20px 64px; max-width: 1240px; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans",
  sans-serif; overflow-wrap: break-word;
}
header p { margin: 2px 0; color: var(--muted); }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 40px 0 12px; font-size: 1.25rem; }
h3 { margin: 0 0 6px; font-size: 1rem; }
a { color: var(--series-1); }
nav { margin: 14px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .92rem; }
nav a { padding: 4px 0; }
.card {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px;
}
.verdict { margin: 0 0 12px; }
.notes { margin: 20px 0 0; padding: 10px 16px; border-left: 4px solid var(--note-edge);
  background: var(--note-back); border-radius: 4px; }
.notes p { margin: 2px 0; }
.figures { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; max-width: 460px; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
figcaption { padding-top: 8px; color: var(--muted); font-size: .84rem;
  line-height: 1.4; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: .88rem; }
tbody th { font-weight: 600; }
.headline td { font-size: 1.08rem; white-space: nowrap; }
.headline .what { display: block; font-weight: 400; font-size: .84rem; line-height: 1.4;
  color: var(--muted); max-width: 62ch; }
.tag { display: inline-block; padding: 1px 7px; border-radius: 9px; font-size: .8rem;
  white-space: nowrap; }
.better { color: var(--good); background: var(--good-back); }
.worse { color: var(--bad); background: var(--bad-back); }
.plain { color: var(--muted); }
.columns { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.share { display: inline-block; height: .7em; background: var(--series-1); border-radius: 2px;
  margin-right: 8px; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 8px 0 0; font-size: .84rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .92em; overflow-wrap: anywhere; }
.facts td { overflow-wrap: anywhere; }
.responses td { white-space: pre-wrap; overflow-wrap: anywhere; }
.responses td + td { white-space: nowrap; }
.responses caption { text-align: left; padding: 2px 0 6px; }
.responses + .responses { margin-top: 14px; }
summary { cursor: pointer; padding: 4px 0; font-weight: 600; }
.hint { color: var(--muted); font-size: .88rem; margin: 8px 0 0; }
@media (max-width: 560px) {
  body { padding: 16px 12px 48px; }
  .card { padding: 12px; }
  th, td { padding: 8px 5px; }
  .headline table, .headline tbody, .headline tr { display: block; }
  .headline thead { display: none; }
  .headline tr { display: grid; grid-template-columns: auto auto 1fr; gap: 2px 8px;
    padding: 10px 0; border-bottom: 1px solid var(--rule); }
  .headline tr:last-child { border-bottom: 0; }
  .headline tbody th { grid-column: 1 / -1; padding: 0; border: 0; }
  .headline td { padding: 2px 0; border: 0; text-align: left; font-size: 1rem; }
  .headline td::before { content: attr(data-label) " "; font-size: .75rem; color: var(--muted); }
  .headline .tag { padding: 1px 4px; font-size: .75rem; }
  .headline td:last-child { text-align: right; }
  .headline td:last-child::before { content: ""; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb;
    --good: #064; --bad: #901; --good-back: #fff; --bad-back: #fff; --note-back: #fff;
    --series-1: #0b62a4; --series-2: #c2500c; --series-3: #087f5f; --series-4: #9a3f86;
    --series-5: #866a00; --series-6: #5f6b7a; --series-7: #b3263e;
  }
  body { max-width: none; padding: 0; font-size: 10.5pt;
    print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; }
  .figures { grid-template-columns: 1fr 1fr; }
  .card, figure, tr { break-inside: avoid; }
  .card.headline, .card:has(table) { break-inside: auto; }
  .headline .what { font-size: .75rem; max-width: none; }
  .headline td { font-size: 1rem; }
  th, td { padding-top: 4px; padding-bottom: 4px; }
  h2 { margin-top: 18px; }
  .figures, .columns { gap: 8px; }
  .card { padding: 8px 10px; }
  figure svg { max-width: 272px; }
  figcaption { font-size: .72rem; }
  h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
