const find = (id) => document.getElementById(id);
const WAIT = 200; // ms after a stroke until the model is asked

const many = (number, one, more = `${one}s`) => `${number} ${number === 1 ? one : more}`;

function button(text, act, properties = {}) {
  const made = make("button", { type: "button", ...properties }, text);
  made.addEventListener("click", act);
  return made;
}

// A button to choose files with; `take` gets each as a data URL.
function files(text, multiple, take) {
  const input = make("input", { type: "file", accept: "image/*", multiple });
  input.addEventListener("change", async () => {
    const all = [...input.files];
    input.value = "";
    for (const file of all) {
      const reader = new FileReader();
      await new Promise((done) => {
        reader.onloadend = done;
        reader.readAsDataURL(file);
      });
      if (reader.error) fail(`${file.name} cannot be read`);
      else take(reader.result, file.name);
    }
  });
  return make("label", { className: "file" }, text, input);
}

const base64 = (url) => url.split(",")[1] ?? "";

/* --- the classes -------------------------------------------------------------------------------- */

const classes = []; // {card, name(), pad, pictures}

function addClass(fixed) {
  const letter = [..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"].find((own) => classes.every((other) => other.name() !== own));
  const entry = make("input", { value: fixed ?? letter, maxLength: 60, autocomplete: "off" });
  entry.setAttribute("aria-label", "name of the class");
  const own = { pictures: [], name: () => (fixed === undefined ? entry.value.trim() : fixed) };
  const kept = make("ul", { className: "kept" });
  const keep = () => {
    const url = own.pad.taken();
    if (url !== null) own.add(url, "drawing");
  };
  own.pad = new Pad(() => `a pad to draw ${own.name()} on`, stale, keep);
  own.add = (url, what) => {
    own.pictures.push(url);
    const image = make("img", { src: url, alt: what, title: what });
    const item = make("li", {}, button(image, () => {
      own.pictures.splice(own.pictures.indexOf(url), 1);
      item.remove();
      stale();
      own.pad.canvas.focus();
    }));
    item.firstChild.setAttribute("aria-label", `remove this ${what} of ${own.name()}`);
    kept.append(item);
    stale();
  };
  own.keep = keep;
  const top = make("div", { className: "top" }, fixed === undefined ? entry : make("strong", {}, fixed));
  if (fixed === undefined) {
    top.append(button("Remove", () => {
      classes.splice(classes.indexOf(own), 1);
      own.card.remove();
      count();
      stale();
      find("more").focus();
    }));
    entry.addEventListener("input", stale);
  }
  const tools = make("div", { className: "tools" }, button("Keep, draw another", keep), button("Undo", () => own.pad.undo()),
    button("Clear", () => own.pad.clear()), files("Add pictures", true, own.add));
  own.card = make("div", { className: "card" }, top, own.pad.canvas, tools, kept);
  own.card.setAttribute("role", "group");
  own.card.setAttribute("aria-label", "a class and its examples");
  classes.push(own);
  find("classes").append(own.card);
  count();
  return own;
}

function count() {
  find("more").hidden = facts.fixed !== null || classes.length >= facts.most;
}

/* --- asking ------------------------------------------------------------------------------------- */

async function ask(what, body) {
  let answer;
  const text = JSON.stringify(body);
  // the server would not read it: the connection would end, and nobody could say why
  if (text.length > facts.most_bytes) throw new Error(`more than ${facts.most_bytes / 2 ** 20} MiB of pictures: give fewer or smaller ones`);
  try {
    answer = await fetch(what, { method: "POST", headers: { "Content-Type": "application/json" }, body: text });
  } catch {
    throw new Error("the server does not answer: does fomaml demo still run?");
  }
  let found;
  try {
    found = await answer.json();
  } catch {
    found = { error: `the server failed (${answer.status}): its terminal says why` };
  }
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function fail(line, id = "error") {
  find(id).textContent = line;
  find(id).hidden = !line;
}

let model = null; // what /adapt has answered
let answered = null; // what /predict has answered, with its picture
let tries = []; // {truth, probabilities}
let number = 0; // of the questions: answers that come late are dropped

function stale() {
  if (model) find("status").textContent = "The examples have changed since: press Adapt again.";
}

async function adapt() {
  fail("");
  for (const own of classes) own.keep();
  const some = facts.fixed ? classes.filter((own) => own.pictures.length) : classes;
  find("adapt").disabled = true;
  find("status").textContent = "Adapting …";
  try {
    model = await ask("adapt", { classes: some.map((own) => ({ name: own.name(), pictures: own.pictures.map(base64) })) });
    tries = [];
    number += 1;
    const time = model.seconds < 0.995 ? `${(1000 * model.seconds).toFixed(0)} ms` : `${model.seconds.toFixed(1)} s`;
    find("status").textContent = `Adapted to ${many(model.examples, "example")} of ${many(model.classes.length, "class", "classes")} in ` +
      `${many(model.steps.at(-1), "step")}: ${time}.`;
    find("worth").textContent = `${model.worth[0].toUpperCase()}${model.worth.slice(1)}.`;
    find("keep").hidden = !facts.save;
    find("try").hidden = false;
    find("before").textContent = `before (${many(model.steps[0], "step")})`;
    find("after").textContent = `after ${many(model.steps.at(-1), "step")}`;
    find("truth").replaceChildren("It was: ", ...model.classes.map((name) => button(name, () => label(name))));
    find("tally").textContent = "";
    curve();
    if (answered) await predict(answered.url);
  } catch (error) {
    find("status").textContent = "";
    fail(error.message);
    stale();
  } finally {
    find("adapt").disabled = false;
  }
}

async function predict(url) {
  const mine = ++number;
  fail("", "query-error");
  try {
    const found = await ask("predict", { model: model.model, picture: base64(url) });
    if (mine === number) show({ ...found, url });
  } catch (error) {
    if (mine !== number) return;
    forget();
    fail(error.message, "query-error");
  }
}

function forget() {
  answered = null;
  find("answer").hidden = true;
  find("said").textContent = "Draw one of your symbols again.";
}

const best = (values) => values.indexOf(Math.max(...values));

function show(found) {
  answered = found;
  const [first, last] = [found.probabilities[0], found.probabilities.at(-1)];
  find("said").textContent = `${found.classes[best(last)]}, ${percent(Math.max(...last))}`;
  find("rows").replaceChildren(...found.classes.map((name, n) => {
    const cells = [first[n], last[n]].map((value) => {
      const bar = make("div", { className: "bar" });
      bar.style.width = `${100 * value}%`;
      return make("td", {}, percent(value), make("div", { className: "track" }, bar));
    });
    const heading = make("th", { scope: "row" }, name);
    return make("tr", { className: n === best(last) ? "first" : "" }, heading, ...cells);
  }));
  find("from-the-start").hidden = !facts.head_of_classes;
  for (const own of find("truth").querySelectorAll("button")) own.disabled = false;
  find("answer").hidden = false;
  const series = found.classes.map((name, n) => ({ name, values: found.probabilities.map((own) => own[n]) }));
  find("path").replaceChildren(...chart(found.steps, series));
}

// The person says what the picture was: the tally, and the accuracy over the steps.
function label(name) {
  tries.push({ truth: answered.classes.indexOf(name), probabilities: answered.probabilities });
  const right = right_at();
  find("tally").textContent = `Right: ${right.at(-1)} of ${tries.length} after adaptation, ${right[0]} before.`;
  for (const own of find("truth").querySelectorAll("button")) own.disabled = true;
  curve();
}

const right_at = () => model.steps.map((_, n) => tries.filter((own) => best(own.probabilities[n]) === own.truth).length);

async function keep() {
  fail("");
  try {
    const { saved } = await ask("keep", { model: model.model });
    find("status").textContent = `Saved in ${saved}. In the shell: fomaml predict ${saved} INPUT`;
  } catch (error) {
    fail(error.message);
  }
}

/* --- start -------------------------------------------------------------------------------------- */

function curve() {
  const series = [
    { name: "probability of the right class", values: model.probability, wide: 6 },
    { name: "accuracy", values: model.accuracy, wide: 3.5 },
  ];
  if (tries.length) series.push({ name: `accuracy on ${many(tries.length, "try", "tries")}`, values: right_at().map((own) => own / tries.length) });
  find("with-tries").hidden = !tries.length;
  find("learning").hidden = false;
  find("learning").querySelector(".chart").replaceChildren(...chart(model.steps, series));
}

find("run").textContent = facts.run;
find("learned").textContent = facts.learned;
find("most").textContent = facts.most;
find("own-names").hidden = facts.fixed !== null;
for (const name of facts.fixed ?? [undefined, undefined]) addClass(name);
find("more").addEventListener("click", () => addClass().pad.canvas.focus());
find("adapt").addEventListener("click", adapt);
find("keep").addEventListener("click", keep);

let timer = 0;
const shown = make("p", { className: "shown", hidden: true }, make("img", { alt: "the picture that was added" }));
const query = new Pad(() => "a pad to draw a symbol on, which the model then judges", () => {
  clearTimeout(timer);
  shown.hidden = true;
  fail("", "query-error");
  if (!query.strokes.length) {
    number += 1;
    forget();
  } else timer = setTimeout(() => predict(picture(query.strokes)), WAIT);
}, () => query.clear());
find("query").append(query.canvas, make("div", { className: "tools" }, button("Clear", () => query.clear()),
  button("Undo", () => query.undo()), files("Take a picture instead", false, (url) => {
    query.clear();
    clearTimeout(timer);
    shown.firstChild.src = url;
    shown.hidden = false;
    predict(url);
  })), shown);
