// A slider shows one picture of each strip above it.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const images = slider.closest("figure").querySelectorAll(".strip img"), out = slider.closest("figure").querySelector("output");
  const values = slider.dataset.values.split(" ");
  const show = () => {
    for (const image of images) image.style.transform = `translateX(${-128 * slider.value}px)`;
    out.textContent = values[slider.value];
  };
  slider.addEventListener("input", show);
  show();
}
