// What an answer or a document costs, as a list of names and figures.

export function showCost(list, items) {
  list.replaceChildren(
    ...items
      .filter(([, value]) => value !== null)
      .map(([name, value]) => {
        const row = document.createElement("div");
        const dt = document.createElement("dt");
        const dd = document.createElement("dd");
        dt.textContent = name;
        dd.textContent = value;
        row.append(dt, dd);
        return row;
      }),
  );
}

export function count(number) {
  return number === null || number === undefined ? null : Math.round(number).toLocaleString("en");
}

export function bytes(number) {
  if (number < 1e6) return `${(number / 1e3).toFixed(1)} kB`;
  return number < 1e9 ? `${(number / 1e6).toFixed(1)} MB` : `${(number / 1e9).toFixed(2)} GB`;
}

// "1.2 MB, 1/6.1 of bf16": the bytes beside those that all tokens take in a bf16 cache.
export function bytesAgainst(held, full) {
  if (held === null || held === undefined) return null;
  return full && held ? `${bytes(held)}, 1/${(full / held).toFixed(1)} of bf16` : bytes(held);
}

export function milliseconds(ms) {
  if (ms === null || !Number.isFinite(ms)) return null;
  return ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
