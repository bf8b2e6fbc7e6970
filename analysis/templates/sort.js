// Sortable tables: a click, Enter or Space on a column's button sorts its rows; again, the other way round.
// Cells carry their value in data-v where it is a number; empty cells stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const value = (row) => {
        const cell = row.cells[column];
        return "v" in cell.dataset ? parseFloat(cell.dataset.v) : cell.textContent.trim();
      };
      const numeric = Array.from(body.rows).some((row) => "v" in row.cells[column].dataset);
      const now = head.getAttribute("aria-sort");
      const next = now ? (now === "ascending" ? "descending" : "ascending") : (numeric ? "descending" : "ascending");
      const sign = next === "ascending" ? 1 : -1;
      const rows = Array.from(body.rows).sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      body.append(...rows);
    });
  });
}
