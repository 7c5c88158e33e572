"use strict";
const slider = document.getElementById("slider");
if (slider) {
  const show = () => {
    for (const one of document.querySelectorAll("[data-round]")) one.hidden = one.dataset.round !== slider.value;
    const at = document.querySelector("#steps > :not([hidden])").dataset.at;
    for (const line of document.querySelectorAll(".now")) line.setAttribute("d", `M${at} 0V1000`);
  };
  slider.addEventListener("input", show);
  slider.hidden = false;
  show();
}
