"use strict";
(async () => {
  // ---- what is packed ------------------------------------------------------------------------
  const unpacked = (name) => {
    const bytes = Uint8Array.from(atob(document.getElementById(name).textContent), (letter) =>
      letter.charCodeAt(0),
    );
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const [data, code] = await Promise.all(["report-data", "report-plotly"].map(unpacked));
  const { figures, shared } = JSON.parse(data);
  const library = document.createElement("script");
  library.textContent = code;
  document.head.append(library);

  const root = document.documentElement;
  const narrowBelow = 560, printed = 680;
  const byTouch = matchMedia("(pointer: coarse)").matches;

  // ---- theme ---------------------------------------------------------------------------------
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  // Figures name their colours for a light page; these are their counterparts on a dark one.
  const onDark = {
    "#000000": "#e4e6e8", "black": "#e4e6e8", "#222222": "#e4e6e8", "#333333": "#d3d6d9",
    "#444444": "#c3c7cb", "#555555": "#b4b9be", "#666666": "#a9aeb4", "#767676": "#9aa1a8",
    "#888888": "#969da4", "#999999": "#8f969d", "#0072b2": "#4fa8e0", "#d55e00": "#f0813a",
    "#009e73": "#2fc196", "#cc79a7": "#dd95bd", "#e69f00": "#f0b340", "white": "#1b1f23",
    "#ffffff": "#1b1f23", "#f2f2f2": "#2a3036", "#808080": "#9aa1a8",
  };

  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;

  const swatch = document.createElement("i");
  swatch.hidden = true;
  document.body.append(swatch);
  const template = () => {
    // Read of an element: the variable itself holds what it is on either page.
    const [ink, muted, line, surface] = ["--ink", "--muted", "--line", "--surface"].map((name) => {
      swatch.style.color = `var(${name})`;
      return getComputedStyle(swatch).color;
    });
    const family = getComputedStyle(root).getPropertyValue("--interface");
    const axis = {
      automargin: true, gridcolor: line, linecolor: muted, tickcolor: muted, zerolinecolor: muted,
      zerolinewidth: 1, ticks: "outside", ticklen: 4, showline: true,
      title: { font: { size: 13, color: ink }, standoff: 8 }, tickfont: { color: muted },
    };
    const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family, size: 12.5, color: ink },
        colorway: isDark() ? colours.map((colour) => onDark[colour] ?? colour) : colours,
        xaxis: axis, yaxis: axis,
        margin: { l: 60, r: 20, t: 36, b: 50 },
        legend: { bgcolor: "rgba(0,0,0,0)", font: { size: 12 } },
        hoverlabel: {
          bgcolor: surface, bordercolor: muted, align: "left", namelength: -1,
          font: { family, size: 12.5, color: ink },
        },
        coloraxis: { colorbar: { outlinewidth: 0 } },
        annotationdefaults: { font: { color: ink } },
      },
    };
  };

  // ---- figures -------------------------------------------------------------------------------
  /** A figure with its shared arrays in place and, on a dark page, its colours exchanged. */
  const expand = (value, key) => {
    if (typeof value === "string") {
      return isDark() && key !== "text" ? (onDark[value.toLowerCase()] ?? value) : value;
    }
    if (Array.isArray(value)) return value.map((item) => expand(item, key));
    if (value === null || typeof value !== "object") return value;
    if ("$shared" in value) {
      const array = shared[value.$shared];
      return key === "color" && Array.isArray(array) ? expand(array, key) : array;
    }
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, expand(item, name)]));
  };

  const isPaneTitle = ({ xref, yref, showarrow }) =>
    xref === "paper" && yref === "paper" && showarrow === false;

  /** Put panes that stand side by side in one row one above the other. */
  const stack = (layout) => {
    const ends = Object.keys(layout).filter((key) => /^xaxis\d*$/.test(key)).map((key) => key.slice(5));
    const tops = new Set(ends.map((end) => layout[`yaxis${end}`].domain[1]));
    if (ends.length < 2 || tops.size > 1) return;
    const gap = 0.36 / ends.length, height = (1 - gap * (ends.length - 1)) / ends.length;
    const lefts = ends.map((end) => layout[`xaxis${end}`].domain[0]);
    for (const title of (layout.annotations ?? []).filter(isPaneTitle)) {
      title.y = 1 - lefts.indexOf(title.x) * (height + gap);
      title.x = 0;
    }
    ends.forEach((end, index) => {
      const top = 1 - index * (height + gap);
      Object.assign(layout[`xaxis${end}`], { domain: [0, 1] });
      Object.assign(layout[`yaxis${end}`], { domain: [top - height, top], showticklabels: true });
      layout[`yaxis${end}`].title ??= layout.yaxis.title;
      layout[`xaxis${end}`].title ??= layout.xaxis.title;
    });
    const { t, b } = layout.margin;
    layout.height = t + b + (layout.height - t - b) * ends.length * 0.9;
  };

  // The height of plots that stand side by side on the first screen, so that answers are on it too.
  const opened = 430, beside = matchMedia("(min-width: 76.01rem)");
  const adapt = (layout, width, first) => {
    const narrow = width < narrowBelow;
    layout.template = template();
    layout.autosize = true;
    delete layout.width;
    if ("print" in root.dataset) Object.assign(layout, { autosize: false, width: printed });
    layout.height ??= 440;
    if (byTouch) layout.dragmode = false; // else it eats scrolling
    for (const title of (layout.annotations ?? []).filter(isPaneTitle)) {
      title.font = { size: narrow ? 12 : 14, ...title.font };
      if (narrow) title.font.size = Math.min(title.font.size, 12);
      if (narrow && !(first && beside.matches) && title.text.length > 40) title.text = title.text.replace(/ · (?=[^·]*$)/, "<br>");
    }
    if (first && beside.matches && !("print" in root.dataset)) {
      layout.height = opened;
      layout.template.layout.xaxis.title.font.size = 11; // of the other axis too
    }
    if (!narrow) return layout;
    if (!first) stack(layout);
    layout.margin = { ...layout.margin, l: 44, r: 10 };
    layout.font = { ...layout.font, size: 11 };
    if (layout.showlegend !== false) {
      layout.legend = {
        ...layout.legend, orientation: "h", font: { size: 11 },
        x: 0, xref: "container", xanchor: "left", y: 0, yref: "container", yanchor: "bottom",
      };
    }
    return layout;
  };

  const choiceOf = (plot) =>
    Number(document.querySelector(`select[data-panel="${plot.dataset.panel}"]`)?.value ?? 0);

  const draw = async (plot) => {
    const figure = figures[plot.dataset.panel][choiceOf(plot)];
    plot.dataset.state = "drawing";
    plot.setAttribute("aria-label", figure.label);
    const chosen = plot.closest("figure").querySelector(".chosen span");
    if (chosen) chosen.textContent = plot.closest("figure").querySelector("select").selectedOptions[0].text;
    const numbers = document.querySelector(`details.numbers[data-panel="${plot.dataset.panel}"]`);
    if (numbers.open) tabulate(numbers);
    const layout = adapt(expand(figure.layout), "print" in root.dataset ? printed : plot.clientWidth, plot.closest(".overview"));
    // Room is kept before the figure is there, so that the page does not jump.
    plot.style.minHeight = `${layout.height}px`;
    await Plotly.react(plot, expand(figure.data), layout, {
      responsive: true, displaylogo: false, displayModeBar: byTouch ? false : "hover",
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
      toImageButtonOptions: { format: "svg", filename: plot.dataset.panel },
    });
    plot.dataset.narrow = String(plot.clientWidth < narrowBelow);
    plot.dataset.state = "ready";
  };

  const plots = [...document.querySelectorAll(".plot")];
  const drawn = () => plots.filter((plot) => plot.dataset.state);
  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !target.dataset.state) draw(target);
      }
    },
    { rootMargin: "800px 0px" },
  );
  for (const plot of plots) {
    const own = figures[plot.dataset.panel][0].layout.height ?? 440;
    plot.style.minHeight = `${beside.matches && plot.closest(".overview") ? opened : own}px`;
    near.observe(plot);
  }
  for (const select of document.querySelectorAll("select[data-panel]")) {
    select.addEventListener("change", () =>
      draw(document.querySelector(`.plot[data-panel="${select.dataset.panel}"]`)),
    );
  }

  // ---- folded parts --------------------------------------------------------------------------
  /** A table of the numbers that a plot shows, for those who cannot see it. */
  const tabulate = (box) => {
    const plot = document.querySelector(`.plot[data-panel="${box.dataset.panel}"]`);
    const { head, columns } = expand(figures[plot.dataset.panel][choiceOf(plot)].table, "text");
    const table = document.createElement("table");
    const cell = (row, kind, text) => {
      const made = document.createElement(kind);
      const written = typeof text === "number" ? String(Number(text.toPrecision(4))).replace("-", "−") : text;
      made.textContent = written ?? "–";
      if (kind === "th") made.scope = "col";
      row.append(made);
      return made;
    };
    const words = columns.map((column) => column.some((value) => typeof value === "string"));
    const top = table.createTHead().insertRow();
    head.forEach((heading, index) => cell(top, "th", heading).classList.toggle("words", words[index]));
    const body = table.createTBody();
    for (let index = 0; index < (columns[0]?.length ?? 0); index += 1) {
      const row = body.insertRow();
      columns.forEach((column, at) => cell(row, "td", column[index]).classList.toggle("words", words[at]));
    }
    const scroll = document.createElement("div");
    Object.assign(scroll, { className: "scroll tall", tabIndex: 0 });
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `${plot.getAttribute("aria-label")}: numbers`);
    scroll.append(table);
    box.querySelector(".scroll")?.remove();
    box.append(scroll);
  };
  for (const box of document.querySelectorAll("details.numbers")) {
    box.addEventListener("toggle", () => box.open && tabulate(box));
  }
  const unfold = (name) => {
    const target = document.getElementById(name ?? "");
    if (target?.matches("details")) target.open = true;
  };
  addEventListener("hashchange", () => unfold(location.hash.slice(1)));
  document.querySelector(".contents").addEventListener("click", ({ target }) => unfold(target.hash?.slice(1)));
  unfold(location.hash.slice(1));

  // On paper every panel is open, every sentence is whole, and every plot as wide as the page.
  let folded = [], theme;
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details.panel:not([open]), .findings details:not([open])")];
    for (const panel of folded) panel.open = true;
    theme = root.dataset.theme;
    Object.assign(root.dataset, { theme: "light", print: "" });
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    for (const panel of folded) panel.open = false;
    delete root.dataset.print;
    delete root.dataset.theme;
    if (theme) root.dataset.theme = theme;
    drawn().forEach(draw);
  });

  let resizing;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(() => {
      for (const plot of drawn()) {
        if (plot.dataset.narrow !== String(plot.clientWidth < narrowBelow)) draw(plot);
      }
    }, 150);
  });

  const showTheme = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
    button.setAttribute("aria-pressed", String(isDark()));
    drawn().forEach(draw);
  };
  try {
    const kept = localStorage.getItem("lrqp-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch { /* storage may be switched off; the choice then lasts as long as the page */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("lrqp-theme", root.dataset.theme);
    } catch { /* as above */ }
    showTheme();
  });
  prefersDark.addEventListener("change", showTheme);
  showTheme();

  // ---- tables --------------------------------------------------------------------------------
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return a.localeCompare(b, undefined, { numeric: true });
  };
  for (const heading of document.querySelectorAll("table.sortable th")) {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = heading.closest("table").tBodies[0];
      const value = (row) => row.cells[heading.cellIndex].dataset.value;
      const rows = [...body.rows].sort((one, two) => {
        const [a, b] = [value(one), value(two)];
        // Missing values come last, whichever way the others run.
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return descending ? compare(b, a) : compare(a, b);
      });
      body.append(...rows);
    });
  }

  // ---- contents ------------------------------------------------------------------------------
  const contents = document.querySelector(".contents details");
  if (matchMedia("(max-width: 64rem)").matches) contents.open = false;
  const links = new Map(
    [...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]),
  );
  const spy = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-10% 0px -80% 0px" },
  );
  document.querySelectorAll("section[id], .panel[id]").forEach((part) => spy.observe(part));
})();
