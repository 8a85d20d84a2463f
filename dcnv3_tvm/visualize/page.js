"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const picture = find("picture"), overlay = find("overlay"), heat = find("heat");
  const MARGIN = 0.08 * Math.max(data.width, data.height); // around the photo, for points outside
  const WIDTH = data.width + 2 * MARGIN, HEIGHT = data.height + 2 * MARGIN;
  const NOT_A_NUMBER = -32768;
  const ALL = -1;
  // Viridis: its lightness grows evenly, also for colour-blind readers.
  const COLOURS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962",
    "#addc30", "#fde725"].map((text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16)));

  function bytes(text) {
    const decoded = atob(text), result = new Uint8Array(decoded.length);
    for (let i = 0; i < decoded.length; i++) result[i] = decoded.charCodeAt(i);
    return result;
  }

  for (const block of data.blocks) {
    block.shifts = new Int16Array(bytes(block.displacement).buffer);
    block.shares = new Int16Array(bytes(block.weights).buffer);
    delete block.displacement;
    delete block.weights;
  }

  const state = { index: data.start, y: 0, x: 0, group: ALL, view: "points" };

  /* Sampling. Positions and points are [x, y] in pixels of the block's input. */

  function groupsOf(block, group) {
    return group === ALL ? Array.from({ length: block.groups }, (_, i) => i) : [group];
  }

  function pointsOf(block, y, x, group) {
    const count = block.grid.length;
    const first = ((y * block.output[1] + x) * block.groups + group) * count;
    return block.grid.map(([gridX, gridY], p) => {
      const i = first + p;
      const base = [gridX + x * block.step[1], gridY + y * block.step[0]];
      const broken = block.shifts[2 * i] === NOT_A_NUMBER;
      const shift = [block.shifts[2 * i] * block.scale, block.shifts[2 * i + 1] * block.scale];
      return {
        base, broken, weight: block.shares[i] * block.weight_scale,
        place: broken ? base : [base[0] + shift[0], base[1] + shift[1]],
        length: broken ? 0 : Math.hypot(shift[0] * block.stride[1], shift[1] * block.stride[0]),
      };
    });
  }

  /* Output positions in the image, as [y, x]. */

  const outputStride = (block) => block.stride.map((value, axis) => value * block.step[axis]);
  const centreOf = (block, y, x) => [y, x].map((place, axis) =>
    block.origin[axis] + (block.first[axis] + place * block.step[axis]) * block.stride[axis]);
  const nearestTo = (block, place) => place.map((each, axis) =>
    Math.round((each - centreOf(block, 0, 0)[axis]) / outputStride(block)[axis]));

  /* Share what the output positions of a block have among the pixels that they sample. */
  function spread(block, share, group) {
    const [height, width] = block.size, result = new Float64Array(height * width);
    const { grid, groups, scale, shifts, shares, step } = block, count = grid.length;
    const chosen = groupsOf(block, group);
    const add = (row, column, part) => {
      if (row >= 0 && row < height && column >= 0 && column < width) {
        result[row * width + column] += part;
      }
    };
    // Without the arrays of pointsOf, which take most of the time for a million points.
    for (let position = 0; position < share.length; position++) {
      if (!share[position]) continue;
      const baseY = Math.floor(position / block.output[1]) * step[0];
      const baseX = (position % block.output[1]) * step[1];
      for (const each of chosen) {
        for (let p = 0, i = (position * groups + each) * count; p < count; p++, i++) {
          if (shifts[2 * i] === NOT_A_NUMBER) continue;
          const x = baseX + grid[p][0] + shifts[2 * i] * scale, left = Math.floor(x);
          const y = baseY + grid[p][1] + shifts[2 * i + 1] * scale, top = Math.floor(y);
          const part = share[position] * shares[i] * block.weight_scale / chosen.length;
          add(top, left, part * (top + 1 - y) * (left + 1 - x));
          add(top, left + 1, part * (top + 1 - y) * (x - left));
          add(top + 1, left, part * (y - top) * (left + 1 - x));
          add(top + 1, left + 1, part * (y - top) * (x - left));
        }
      }
    }
    return result;
  }

  function follow(earlier, later, contribution) {
    const share = new Float64Array(earlier.output[0] * earlier.output[1]);
    const nearest = (place, axis) => Math.min(
      Math.ceil(place * later.stride[axis] / (earlier.stride[axis] * earlier.step[axis]) - 0.5),
      earlier.output[axis] - 1);
    contribution.forEach((value, i) => {
      const row = nearest(Math.floor(i / later.size[1]), 0), column = nearest(i % later.size[1], 1);
      share[row * earlier.output[1] + column] += value;
    });
    return share;
  }

  function receptiveField() {
    let block = data.blocks[state.index];
    let share = new Float64Array(block.output[0] * block.output[1]);
    share[state.y * block.output[1] + state.x] = 1;
    let contribution = spread(block, share, state.group);
    for (let index = state.index - 1; index >= 0; index--) {
      const earlier = data.blocks[index];
      contribution = spread(earlier, follow(earlier, block, contribution), ALL);
      block = earlier;
    }
    return { values: contribution, size: block.size, stride: block.stride, origin: block.origin };
  }

  function offsetLengths(block) {
    const values = new Float64Array(block.output[0] * block.output[1]);
    const groups = groupsOf(block, state.group);
    values.forEach((_, i) => {
      const y = Math.floor(i / block.output[1]), x = i % block.output[1];
      let sum = 0;
      for (const each of groups) {
        for (const point of pointsOf(block, y, x, each)) sum += point.length;
      }
      values[i] = sum / (groups.length * block.grid.length);
    });
    return { values, size: block.output, stride: outputStride(block), origin: centreOf(block, 0, 0) };
  }

  /* Drawing. */

  function colour(part) {
    const place = Math.min(Math.max(part, 0), 1) * (COLOURS.length - 1);
    const low = Math.min(Math.floor(place), COLOURS.length - 2);
    return COLOURS[low].map((c, i) => Math.round(c + (COLOURS[low + 1][i] - c) * (place - low)));
  }

  const toImage = (block, [x, y]) =>
    [block.origin[1] + x * block.stride[1], block.origin[0] + y * block.stride[0]];
  const format = (value, digits = 1) => value.toFixed(digits);

  function draw(parent, name, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }

  function drawPoints(parent, points, unit, place, most) {
    for (const { base } of points) {
      const [cx, cy] = place(base);
      draw(parent, "circle", { class: "grid", cx, cy, r: 0.22 * unit, "stroke-width": 0.08 * unit });
    }
    for (const point of [...points].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))) {
      if (point.broken) continue;
      const [cx, cy] = place(point.place), part = Math.min(Math.abs(point.weight) / most, 1);
      draw(parent, "circle", {
        class: "point", cx, cy, r: unit * (0.35 + 0.9 * Math.sqrt(part)),
        fill: `rgb(${colour(part)})`, "fill-opacity": 0.9, stroke: "#fff",
        "stroke-width": 0.14 * unit,
      });
    }
  }

  function drawCross(parent, [x, y], unit) {
    const path = `M${x - unit} ${y}H${x + unit}M${x} ${y - unit}V${y + unit}`;
    draw(parent, "path", { class: "halo", d: path, "stroke-width": 0.5 * unit });
    draw(parent, "path", { class: "cross", d: path, "stroke-width": 0.25 * unit });
  }

  function drawHeat({ values, size, stride, origin }, bend) {
    const most = Math.max(...values, 1e-12);
    heat.height = size[0];
    heat.width = size[1];
    const context = heat.getContext("2d"), pixels = context.createImageData(size[1], size[0]);
    values.forEach((value, i) => {
      const part = bend(Math.max(value, 0) / most);
      pixels.data.set([...colour(part), 60 + 195 * Math.min(1, 1.4 * part)], 4 * i);
      if (!value) pixels.data[4 * i + 3] = 0;
    });
    context.putImageData(pixels, 0, 0);
    // Pixel i of the map has its centre on pixel origin + i * stride of the image.
    const [top, left] = origin.map((each, axis) => 0.5 + each - 0.5 * stride[axis]);
    Object.assign(heat.style, {
      left: `${100 * left / data.width}%`, top: `${100 * top / data.height}%`,
      width: `${100 * size[1] * stride[1] / data.width}%`,
      height: `${100 * size[0] * stride[0] / data.height}%`,
    });
    return most;
  }

  function legend(name, low, high) {
    find("legend-name").textContent = name;
    find("legend-low").textContent = low;
    find("legend-high").textContent = high;
    const stops = COLOURS.map((each) => `rgb(${each})`).join(",");
    find("legend-bar").style.background = `linear-gradient(90deg, ${stops})`;
  }

  function drawGroups(block, most) {
    const parent = find("groups");
    const reach = 0.6 * Math.max(...block.size.map((size) => Math.min(size, 8)), 4);
    parent.replaceChildren(...groupsOf(block, ALL).map((group) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(state.group === group));
      button.setAttribute("aria-label", `Group ${group}`);
      button.dataset.group = group;
      const svg = draw(button, "svg", { viewBox: `${-reach} ${-reach} ${2 * reach} ${2 * reach}` });
      const centre = [1, 0].map((axis) => block.first[axis] + [state.y, state.x][axis] * block.step[axis]);
      const place = ([x, y]) => [x - centre[0], y - centre[1]];
      drawPoints(svg, pointsOf(block, state.y, state.x, group), 0.09 * reach, place, most);
      button.append(String(group));
      return button;
    }));
  }

  function render() {
    const block = data.blocks[state.index];
    const [top, left] = centreOf(block, state.y, state.x), centre = [left, top];
    // Of the cross, in pixels of the image; points are smaller where there are many.
    const unit = WIDTH * (4 / picture.clientWidth + 1 / 90);
    const points = groupsOf(block, state.group)
      .flatMap((group) => pointsOf(block, state.y, state.x, group));
    const most = Math.max(...points.map((point) => Math.abs(point.weight)), 1e-12);
    overlay.replaceChildren();
    heat.hidden = state.view === "points";
    picture.classList.toggle("dim", state.view !== "points");
    let total = null;
    if (state.view === "points") {
      const size = unit * Math.max(Math.min(Math.sqrt(36 / points.length), 1), 0.4);
      drawPoints(overlay, points, size, (place) => toImage(block, place), most);
      legend("weight of a point", "0", format(most, 2));
    } else if (state.view === "field") {
      const field = receptiveField();
      const largest = drawHeat(field, Math.sqrt);
      total = field.values.reduce((sum, value) => sum + value, 0);
      legend("share of a pixel of the map (square-root scale)", "0", `${(100 * largest).toPrecision(2)} %`);
    } else {
      const largest = drawHeat(offsetLengths(block), (part) => part);
      legend("mean offset length, pixels of the image", "0", format(largest));
    }
    drawCross(overlay, centre, unit);
    drawGroups(block, most);
    describe(block, points, centre, total);
  }

  function describe(block, points, centre, total) {
    const lengths = points.map((point) => point.length);
    const mean = lengths.reduce((sum, length) => sum + length, 0) / lengths.length;
    const inside = points.filter(({ broken, place: [x, y] }) =>
      !broken && x > -1 && x < block.size[1] && y > -1 && y < block.size[0]).length;
    const group = state.group === ALL ? "all groups" : `group ${state.group}`;
    find("status").textContent = `Stage ${block.stage}, block ${block.block}, ${group}: row ${state.y}, `
      + `column ${state.x} of ${block.output[0]} x ${block.output[1]}; mean offset `
      + `${format(mean)} pixels, longest ${format(Math.max(...lengths))}.`;
    const facts = [
      ["Pixel of the image (y, x)", `${format(centre[1], 0)}, ${format(centre[0], 0)}`],
      ["Stride to the image", format(block.stride[0] * block.step[0], 0)],
      ["Points", `${points.length}`],
      ["Points on the map", `${inside}`],
    ];
    if (total !== null) facts.push(["Share on the map", `${format(100 * total)} %`]);
    find("facts").replaceChildren(...facts.flatMap(([name, value]) => {
      const pair = [document.createElement("dt"), document.createElement("dd")];
      pair[0].textContent = name;
      pair[1].textContent = value;
      return pair;
    }));
  }

  /* Choices. */

  function options(select, values, chosen) {
    select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, value === chosen)));
  }

  function choose(index) {
    const before = data.blocks[state.index], block = data.blocks[index];
    [state.y, state.x] = nearestTo(block, centreOf(before, state.y, state.x))
      .map((place, axis) => Math.min(Math.max(place, 0), block.output[axis] - 1));
    state.index = index;
    if (state.group >= block.groups) state.group = ALL;
    const stages = [...new Set(data.blocks.map((each) => each.stage))];
    options(find("stage"), stages.map((stage) => [stage, `${stage}`]), block.stage);
    const siblings = data.blocks.map((each, i) => [i, each]).filter(([, each]) => each.stage === block.stage);
    options(find("block"), siblings.map(([i, each]) => [i, `${each.block}`]), index);
    const groups = groupsOf(block, ALL).map((group) => [group, `${group}`]);
    options(find("group"), [[ALL, "all"], ...groups], state.group);
    render();
  }

  function move(y, x) {
    const [height, width] = data.blocks[state.index].output;
    state.y = Math.min(Math.max(y, 0), height - 1);
    state.x = Math.min(Math.max(x, 0), width - 1);
    render();
  }

  let waiting = null;
  function pointed(event) {
    const box = picture.getBoundingClientRect(), block = data.blocks[state.index];
    const x = (event.clientX - box.left) / box.width * WIDTH - MARGIN - 0.5;
    const y = (event.clientY - box.top) / box.height * HEIGHT - MARGIN - 0.5;
    const place = nearestTo(block, [y, x]);
    if (waiting === null) requestAnimationFrame(() => { move(...waiting); waiting = null; });
    waiting = place; // drawn once a frame
  }
  picture.addEventListener("pointermove", pointed);
  picture.addEventListener("pointerdown", pointed);

  picture.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 4 : 1, { y, x, index } = state;
    const actions = {
      ArrowLeft: () => move(y, x - step), ArrowRight: () => move(y, x + step),
      ArrowUp: () => move(y - step, x), ArrowDown: () => move(y + step, x),
      Home: () => move(y, 0), End: () => move(y, Infinity),
      PageUp: () => choose(Math.max(index - 1, 0)),
      PageDown: () => choose(Math.min(index + 1, data.blocks.length - 1)),
    };
    if (actions[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      actions[event.key]();
    }
  });

  find("stage").addEventListener("change", (event) => {
    const stage = Number(event.target.value);
    choose(data.blocks.findLastIndex((block) => block.stage === stage));
  });
  find("block").addEventListener("change", (event) => choose(Number(event.target.value)));
  find("group").addEventListener("change", (event) => {
    state.group = Number(event.target.value);
    render();
  });
  find("groups").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const group = Number(button.dataset.group);
    state.group = state.group === group ? ALL : group;
    find("group").value = state.group;
    render();
    find("groups").querySelector(`[data-group="${group}"]`).focus();
  });
  find("views").addEventListener("change", (event) => {
    state.view = event.target.value;
    render();
  });

  const photo = find("photo");
  photo.src = data.photo;
  photo.classList.toggle("smooth", data.width > 96);
  Object.assign(find("frame").style, {
    left: `${100 * MARGIN / WIDTH}%`, top: `${100 * MARGIN / HEIGHT}%`,
    width: `${100 * data.width / WIDTH}%`, height: `${100 * data.height / HEIGHT}%`,
  });
  picture.style.aspectRatio = `${WIDTH} / ${HEIGHT}`;
  document.documentElement.style.setProperty("--aspect", WIDTH / HEIGHT);
  overlay.setAttribute("viewBox", `${-MARGIN - 0.5} ${-MARGIN - 0.5} ${WIDTH} ${HEIGHT}`);
  find("about").textContent = data.about;
  new ResizeObserver(() => render()).observe(picture);
  const { output } = data.blocks[data.start];
  state.y = output[0] >> 1;
  state.x = output[1] >> 1;
  choose(data.start);
})();
