// A click on the head of a column sorts its table; what stands below a row, as published, goes with it.
for (const head of document.querySelectorAll(".table thead th:not([scope=colgroup])")) {
  const table = head.closest("table"), at = head.dataset.column ?? head.cellIndex;
  const seconds = { days: 86400, day: 86400, h: 3600, min: 60, s: 1 };
  const value = (text) => {
    const parts = [...text.matchAll(/([\d.]+) (days?|h|min|s)\b/g)];
    if (parts.length) return parts.reduce((sum, [, n, unit]) => sum + n * seconds[unit], 0);
    const number = parseFloat(text.replaceAll(",", "").replace("−", "-").replace("∞", "Infinity"));
    return isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b :
    String(a).localeCompare(String(b), undefined, { numeric: true });
  const sort = () => {
    const down = head.ariaSort === "ascending", units = [];
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.ariaSort = down ? "descending" : "ascending";
    for (const row of [...table.tBodies].flatMap((body) => [...body.rows]))
      row.className ? units.at(-1).rows.push(row) : units.push({ rows: [row], text: row.cells[at].innerText.trim() });
    const none = (unit) => ["", "–"].includes(unit.text);
    units.sort((a, b) => none(a) - none(b) || (down ? -1 : 1) * compare(value(a.text), value(b.text)));
    table.tBodies[0].append(...units.flatMap((unit) => unit.rows));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}
