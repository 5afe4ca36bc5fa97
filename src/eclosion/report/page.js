'use strict';

// The slider over the sample grids shows one of them.
const slider = document.getElementById('which');
if (slider) {
  const frames = document.querySelectorAll('.frame');
  const told = document.querySelector('.samples output');
  const steps = JSON.parse(slider.dataset.steps);
  const show = () => {
    frames.forEach((frame, i) => frame.classList.toggle('on', i === slider.valueAsNumber));
    told.textContent = steps[slider.valueAsNumber];
    slider.setAttribute('aria-valuetext', steps[slider.valueAsNumber]);
  };
  slider.addEventListener('input', show);
  show(); // a browser may have kept the place of the slider over a reload
}

// A pointer or the arrow keys read single values off a curve.
for (const plot of document.querySelectorAll('svg.plot')) {
  const points = JSON.parse(plot.dataset.points); // [left %, top %, step, value]
  const told = plot.closest('figure').querySelector('output');
  const line = plot.querySelector('line.cursor');
  const dot = plot.querySelector('circle.cursor');
  let at = points.length - 1;

  const read = (i) => {
    at = Math.max(0, Math.min(points.length - 1, i));
    const [left, top, step, value] = points[at];
    line.setAttribute('x1', left + '%');
    line.setAttribute('x2', left + '%');
    dot.setAttribute('cx', left + '%');
    dot.setAttribute('cy', top + '%');
    told.textContent = value + ' at step ' + step.toLocaleString('en');
    plot.classList.add('read');
  };
  const rest = () => {
    told.textContent = told.dataset.rest;
    plot.classList.remove('read');
  };
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    const left = (event.clientX - box.left) / box.width * 100;
    let nearest = 0;
    points.forEach((point, i) => {
      if (Math.abs(point[0] - left) < Math.abs(points[nearest][0] - left)) nearest = i;
    });
    read(nearest);
  };
  plot.addEventListener('pointermove', follow);
  plot.addEventListener('pointerdown', follow);
  plot.addEventListener('pointerleave', rest);
  plot.addEventListener('blur', rest);
  plot.addEventListener('keydown', (event) => {
    const places = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: points.length - 1};
    if (event.key in places) {
      event.preventDefault();
      read(places[event.key]);
    }
  });
}
