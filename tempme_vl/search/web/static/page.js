// What a browser has to do itself; everything else is rendered by the server.
"use strict";

const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const video = one("video");

// the number beside a slider
document.addEventListener("input", ({ target }) => {
  if (target.type === "range") target.nextElementSibling.value = target.value;
});
// choices and sliders of a search that is shown take effect at once
one("#search").addEventListener("change", ({ target }) => {
  const shown = document.body.classList.contains("asked");
  if (shown && ["range", "select-one"].includes(target.type)) one("#search").requestSubmit();
});
// fields that are as by default stay out of the address
one("#search").addEventListener("formdata", ({ formData }) => {
  for (const [name, value] of [...formData]) {
    if (value === "" || (name === "k" && value === "12") || (name === "fine" && value === "none")) formData.delete(name);
  }
});

// parts of the page that come later: a form's answer goes into the element that it names
async function load(form) {
  const into = document.getElementById(form.dataset.into);
  into.classList.add("loading");
  try {
    const answer = await fetch(`${form.getAttribute("action")}?${new URLSearchParams(new FormData(form))}`);
    into.innerHTML = await answer.text();
  } catch {
    into.textContent = "The server does not answer.";
  }
  into.classList.remove("loading");
  shade();
}
for (const form of all("form[data-into]")) {
  form.addEventListener("submit", (event) => { event.preventDefault(); load(form); });
  if (form.id === "tokens") { form.addEventListener("change", () => load(form)); load(form); }
}

// the shade over the video: that of the frame nearest to what is shown
const frames = () => all(".frames [data-seek]");
const distance = (frame) => Math.abs(frame.dataset.seek - shown());
const shown = () => (video.error ? still : video.currentTime); // a file that the browser cannot play is shown in stills
let still = Number(video?.dataset.start);

function shade() {
  if (!video || !one(".frames")) return;
  const inside = shown() >= video.dataset.start - 0.25 && shown() <= Number(video.dataset.end) + 0.25;
  const nearer = (best, frame) => (best && distance(best) <= distance(frame) ? best : frame);
  const near = inside && frames().reduce(nearer, null);
  for (const frame of frames()) frame.setAttribute("aria-pressed", String(frame === near));
  const { width, height } = one(".frames").dataset;
  one(".overlay").setAttribute("viewBox", `0 0 ${width} ${height}`);
  const path = near && one("#highlight").checked ? near.querySelector("path").getAttribute("d") : "";
  one(".overlay path").setAttribute("d", path);
}
function seek(button) {
  still = Number(button.dataset.seek);
  const image = button.querySelector("img");
  if (!video.error) video.currentTime = still;
  else if (image) video.poster = image.src.replace(/width=\d+/, "width=960");
  shade();
}
if (video) {
  for (const event of ["timeupdate", "seeked", "loadeddata"]) video.addEventListener(event, shade);
  video.addEventListener("error", () => { video.controls = false; one(".unplayable").hidden = false; shade(); });
  one("#highlight")?.addEventListener("change", shade);
  document.addEventListener("click", ({ target }) => {
    const button = target.closest("[data-seek]");
    if (button) seek(button);
  });
}

// keys: / searches, arrows go through the cards
const cards = all(".card");
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, video, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  if (event.key === "/") {
    event.preventDefault();
    one("[type=search]")?.select();
    one("[type=search]")?.focus();
    return;
  }
  const across = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
  if (!step || !cards.length) return;
  const from = cards.indexOf(document.activeElement);
  const to = from < 0 ? cards.findIndex((card) => card.hasAttribute("aria-current")) + Math.sign(step) : from + step;
  if (cards[to]) { event.preventDefault(); cards[to].focus(); }
});
one(".card[aria-current]")?.focus({ preventScroll: true, focusVisible: false });

// pictures and videos to search by: chosen, dropped or pasted
const file = one("[type=file]");
function send() {
  if (!file.files.length) return;
  const most = Number(one("#upload").dataset.most);
  if (file.files[0].size > most) {
    alert(`This file is larger than ${Math.floor(most / 2 ** 20)} MB.`);
    file.value = "";
    return;
  }
  document.body.classList.add("busy");
  for (const [name, value] of new FormData(one("#search"))) {
    const field = Object.assign(document.createElement("input"), { type: "hidden", name, value });
    const ofTexts = name === "fine" && value === "matching";
    if (["k", "where", "fine"].includes(name) && !ofTexts) one("#upload").append(field);
  }
  one("#upload").submit();
}
file.addEventListener("change", send);
for (const [event, on] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(event, (happened) => {
    if (!happened.dataTransfer.types.includes("Files")) return;
    happened.preventDefault();
    document.body.classList.toggle("dropping", on);
    if (event === "drop") { file.files = happened.dataTransfer.files; send(); }
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) { file.files = clipboardData.files; send(); }
});
